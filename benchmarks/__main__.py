"""Run the benchmarks one after another, then write their tables into the documentation.

    python -m benchmarks [NAME ...]

Each benchmark runs in its own process, with a time limit. If one fails or runs out of time, its old
results stay, its name is printed at the end, and the exit code is 1. BENCH_QUICK=1 makes a trial
run that writes nothing to benchmarks/results or to the documentation. mnist, mnist_compact and
tickets need data, mnn and runtimes other packages; they are not included.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks import tables
from benchmarks.timing import QUICK

# Minutes: at least three times as long as each needs on two idle cores.
LIMITS = {
    "overhead": 20,
    "selection": 15,
    "scale": 5,
    "updates": 10,
    "dynamics": 20,
    "steps": 6,
    "blocks": 15,
    "sizes": 5,
    "channels": 60,
    "payoff": 30,
    "fuse_steps": 5,
    "training": 180,
    "compact_updates": 4,
    "packing": 6,
    "packed_sizes": 30,
    "checkpoints": 10,
    "sharding": 5,
    "oneshot": 60,
    "language_model": 60,
    "sentence_encoder": 90,
}


def run(name: str, limit: float) -> str | None:
    """Run one benchmark for at most `limit` seconds; return the failure, if there is one."""
    command = [sys.executable, "-u", "-m", f"benchmarks.{name}"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"took more than {limit / 60:.0f} minutes"
        finally:
            if process.poll() is None:  # with the processes that it started
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
