"""How long does an update of the places take on compact weights, in dense steps?

    python -m benchmarks.compact_updates

MLPs with 95% zeros in the first two weights, one thread. An update drops 30% of the kept entries by
magnitude and grows as many, at random (SET) or by the gradient (RigL), and moves values, indices
and the state of Adam. It happens once in hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from benchmarks.timing import after, compare, elapsed, own, show, threads, write

WIDTHS, BATCH = (2048, 4096), 128
RULES = dict.fromkeys(("0.weight", "2.weight"), 0.95)
GROWTH = {"SET": "random", "RigL": "gradient"}


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    x, target = torch.randn(BATCH, 784), torch.randn(BATCH, 10)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()

    return step


def dense_step(width: int) -> Callable[[], float]:
    model = mlp(width)
    step = step_of(model, torch.optim.Adam(model.parameters()))
    return lambda: elapsed(step)


def update(width: int, growth: str) -> Callable[[], float]:
    """Return what trains for a step and then returns the milliseconds of an update."""
    model = ps.compact(ps.sparsify(mlp(width), RULES))
    optimizer = torch.optim.Adam(model.parameters())
    controller = ps.DynamicSparsity(
        model, RULES, optimizer, prune="magnitude", growth=growth, redistribution="none",
        prune_rate=0.3, every=1, init="resume",
    )  # fmt: skip
    return after(step_of(model, optimizer), lambda _: controller.step())


def main() -> None:
    results = {}
    for width in WIDTHS:
        with threads(1):
            calls = {"dense step": dense_step(width)}
            calls |= {name: update(width, growth) for name, growth in GROWTH.items()}
            question = f"MLP {width}, batch {BATCH}"
            results[question] = compare(calls, repeats=9, clock=own)
        show(question, results[question])
    write("compact_updates", results)


if __name__ == "__main__":
    main()
