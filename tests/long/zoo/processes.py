"""Checks in processes of their own, with limits of time and memory, one after the other."""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS, GIBIBYTES = 120, 10  # of one processor; a process that waits may take five times as long
Check = Callable[[str, dict[str, object]], None]


def run(
    names: Iterable[str], check: Check, results: Path,
    *, seconds: int = SECONDS, gibibytes: int = GIBIBYTES,
) -> None:  # fmt: skip
    """Write one line of JSON for each name; lines of other names stay.

    `check(name, found)` adds to `found`. What it has added before an error is written too.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = read(results)
    gc.freeze()  # so that processes do not visit, and so copy, what they share
    for name in names:
        lines[name] = {"name": name, **_apart(check, name, seconds, gibibytes)}
        results.write_text("".join(json.dumps(line) + "\n" for _, line in sorted(lines.items())))
        print(name, {k: v for k, v in lines[name].items() if k != "name"}, flush=True)


def read(results: Path) -> dict[str, dict[str, object]]:
    """Return the lines of a file by name."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def _apart(check: Check, name: str, seconds: int, gibibytes: int) -> dict[str, object]:
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, name, there, seconds, gibibytes))
    process.start()
    there.close()
    found: dict[str, object] = {}
    end = time.monotonic() + 5 * seconds
    try:
        while True:
            if not here.poll(max(end - time.monotonic(), 0)):
                return {**found, "error": f"more than {seconds} s"}
            found, done = here.recv()
            if done:
                return found
    except EOFError:
        return {**found, "error": f"the process ended, at {seconds} s or {gibibytes} GiB"}
    finally:
        process.kill()
        process.join()


def _child(check: Check, name: str, connection: Connection, seconds: int, gibibytes: int) -> None:
    limit = gibibytes << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    found = Sent(connection)
    try:
        check(name, found)
    except BaseException as error:  # whatever a library does, the next model is checked
        kind, text = type(error).__name__, " ".join(str(error).split())
        found["error"] = f"{kind}: {text}"[:200]
    found["seconds"] = round(time.process_time(), 1)
    connection.send((dict(found), True))


class Sent(dict[str, object]):
    """A dict that is sent whenever it changes, so that it survives its process."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        self.connection.send((dict(self), False))

    def update(self, found: dict[str, object]) -> None:
        for key, value in found.items():
            self[key] = value
