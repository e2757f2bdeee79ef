"""Run the benchmarks one after another, then put their tables into the documentation.

    python -m benchmarks [NAME ...]

Each runs in a process of its own, within a limit of time. One that fails, or runs out of time, is
named at the end and keeps its old results; the exit code is then 1. With BENCH_QUICK=1 all is only
tried, and nothing is written to benchmarks/results or to the documentation. What needs data, mnist
and tickets, is not among these.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks import tables
from benchmarks._timing import QUICK

# Minutes: three times what each takes on two idle cores, or more.
LIMITS = {
    "overhead": 20,
    "selection": 15,
    "scale": 5,
    "updates": 10,
    "dynamics": 20,
    "steps": 6,
    "blocks": 15,
    "sizes": 5,
    "channels": 10,
    "payoff": 30,
    "packing": 6,
    "checkpoints": 10,
    "sharding": 5,
}


def run(name: str, limit: float) -> str | None:
    """Run one benchmark for `limit` seconds at most; return what went wrong, if anything did."""
    command = [sys.executable, "-u", "-m", f"benchmarks.{name}"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"took more than {limit / 60:.0f} minutes"
        finally:
            if process.poll() is None:  # those that it started go with it
                os.killpg(process.pid, signal.SIGKILL)
    return f"ended with exit code {code}" if code else None


def main(asked: list[str]) -> int:
    unknown = [name for name in asked if name not in LIMITS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are: {', '.join(LIMITS)}", file=sys.stderr)
        return 2
    lines, wrong = [], []
    for name in asked or LIMITS:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        failure = run(name, 60 * LIMITS[name])
        lines.append(f"{name:<12}{time.monotonic() - start:8.0f} s  {failure or ''}".rstrip())
        wrong += [name] if failure else []
    print("==", *lines, sep="\n")
    if not QUICK:
        tables.main([])
    if wrong:
        print(f"FAILED: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
