"""How the benchmarks time: warm-up, interleaved repeats, median and spread, results as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, and the quartiles around it; and the median of the paired ratios."""

    median: float
    low: float
    high: float
    ratio: float


def compare(functions: dict[str, Callable[[], object]], *, repeats: int = 15) -> dict[str, Timing]:
    """Time `functions` in turn, so that drift hits all alike; ratios are to the first of them."""
    for function in functions.values():
        for _ in range(3):
            function()
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        row = {}
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            row[name] = (time.perf_counter() - start) * 1e3
        rounds.append(row)
    first = next(iter(functions))
    results = {}
    for name in functions:
        times = [row[name] for row in rounds]
        low, median, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(row[name] / row[first] for row in rounds)
        results[name] = Timing(median, low, high, ratio)
    return results


def write(name: str, results: dict[str, dict[str, Timing]]) -> Path:
    """Print the results, and write them with the machine and the versions they were had on."""
    for question, timings in results.items():
        print(question)
        for label, t in timings.items():
            print(f"  {label:<24}{t.median:9.3f} ms [{t.low:.3f}, {t.high:.3f}]  x {t.ratio:.3f}")
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    content = {
        "machine": machine,
        "results": {q: {n: asdict(t) for n, t in ts.items()} for q, ts in results.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
