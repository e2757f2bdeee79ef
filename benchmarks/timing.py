"""Timing for benchmarks: warm-up, interleaved repeats, median and spread, results as JSON.

With BENCH_QUICK=1 in the environment each function is called only four times, as a trial, and
results are written to `out/benchmarks`.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

QUICK = os.environ.get("BENCH_QUICK") == "1"
HERE = Path(__file__).parent
RESULTS = HERE.parent / "out" / "benchmarks" if QUICK else HERE / "results"


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in milliseconds, and the median of the paired ratios."""

    median: float
    low: float
    high: float
    ratio: float


def elapsed(function: Callable[[], object]) -> float:
    """Return the milliseconds of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def after(prepare: Callable[[], Any], function: Callable[[Any], object]) -> Callable[[], float]:
    """Return a timed call of `function` on the result of `prepare`, which is not timed."""

    def call() -> float:
        prepared = prepare()
        return elapsed(lambda: function(prepared))

    return call


def compare(
    functions: dict[str, Callable[[], object]],
    *,
    repeats: int = 15,
    warm_up: int = 3,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[Callable[[], Any]], float] = elapsed,
) -> dict[str, Timing]:
    """Time `functions` in turn, so drift affects all equally; ratios are to the first function.

    Each round has an order of its own, because a call is a few percent faster right after one that
    does the same: the last function of a fixed order that is reversed in turn comes after itself.
    `before` runs before each call and is not timed. With `clock=own` the functions return their
    time.
    """
    if QUICK:
        repeats, warm_up = 3, min(warm_up, 1)
    for _ in range(warm_up):
        for function in functions.values():
            function()
    rounds: list[dict[str, float]] = []
    orders = random.Random(0)
    for _ in range(repeats):
        row = {}
        for name in orders.sample(list(functions), len(functions)):
            before()
            row[name] = clock(functions[name])
        rounds.append(row)
    first = next(iter(functions))
    results = {}
    for name in functions:
        times = [row[name] for row in rounds]
        low, median, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(row[name] / row[first] for row in rounds)
        results[name] = Timing(median, low, high, ratio)
    return results


def own(function: Callable[[], float]) -> float:
    """Return the milliseconds that `function` returns."""
    return function()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show(question: str, timings: dict[str, Timing]) -> None:
    """Print the timings of one question."""
    print(question)
    for label, t in timings.items():
        print(f"  {label:<28}{t.median:12.4f} ms [{t.low:.4f}, {t.high:.4f}]  x {t.ratio:.3f}")


def write(
    name: str, results: dict[str, dict[str, Timing]], *, add: bool = False, **more: object
) -> None:
    """Write timings, with the machine and the versions.

    With `add`, what an earlier run on this machine has found stays where this one has not asked.
    """
    timings = {q: {n: asdict(t) for n, t in ts.items()} for q, ts in results.items()}
    unit = "milliseconds; ratio to the first of each question"
    content = {"unit": unit, "results": timings, **more}
    write_content(name, _added(name, content) if add else content)


def _added(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with the entries of the file that it does not have."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    then, now = old.get("machine", {}), machine()
    if any(then.get(key) != now[key] for key in ("torch", "processor", "cores")):
        return content
    return {
        key: {**old.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in content.items()
    }


def write_content(name: str, content: dict[str, object]) -> None:
    """Write other content, with the machine and the versions."""
    RESULTS.mkdir(exist_ok=True, parents=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    print("written:", path.relative_to(HERE.parent))


def machine() -> dict[str, object]:
    """Return the machine, the versions and the date."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """Return the name of the processor, if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
