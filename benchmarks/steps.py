"""What does a step of dynamic training cost, compared with float masks multiplied in place?

    python -m benchmarks.steps

The baseline is the least that a program written by hand does: it multiplies the weights of a dense
network by float masks after each step of the optimizer. Processor time of 40 steps without an
update of the masks, one thread.
"""

from __future__ import annotations

import itertools
import runpy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import parasparse as ps
from benchmarks.timing import HERE, compare, own, show, threads, write

SPARSITY, BATCH, STEPS, NEVER = 0.95, 100, 40, 10**9
NETWORKS = runpy.run_path(str(HERE.parent / "examples" / "lenets.py"))["MODELS"]
NAMES = {"lenet300-100": "LeNet-300-100", "lenet5": "LeNet-5"}


def float_masks(model: nn.Module, _: torch.optim.Optimizer) -> Callable[[], None]:
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    masks = [(torch.rand_like(weight) >= SPARSITY).float() for weight in weights]

    def multiply() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.data.mul_(mask)

    multiply()
    return multiply


def nothing(model: nn.Module, _: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: None


def fixed(model: nn.Module, _: torch.optim.Optimizer) -> Callable[[], None]:
    ps.sparsify(model, SPARSITY)
    return lambda: None


def controlled(method: Callable[..., Any], **keywords: Any) -> Callable[..., Callable[[], None]]:
    """Return what has `method` control a model, and gives its `step`."""

    def made(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        step: Callable[[], None] = method(model, SPARSITY, optimizer, every=NEVER, **keywords).step
        return step

    return made


WAYS: dict[str, Callable[..., Callable[[], None]]] = {
    "float masks": float_masks,
    "no masks": nothing,
    "masks that stay": fixed,
    "sparse momentum": controlled(ps.sparse_momentum, stop=NEVER),
    "SET": controlled(ps.sparse_evolutionary_training, init="constant"),
    "RigL": controlled(ps.rigl, stop=NEVER, init="constant"),
}


def training(build: Callable[[], nn.Module], way: Callable[..., Callable[[], None]]) -> Any:
    """Return what trains for `STEPS` steps, and says how many milliseconds one took."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    after = way(model, optimizer)
    data = [(torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))) for _ in range(64)]
    batches = itertools.cycle(data)

    def steps() -> float:
        start = time.process_time()
        for x, y in itertools.islice(batches, STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            after()
        return (time.process_time() - start) / STEPS * 1e3

    return steps


def main() -> None:
    results = {}
    with threads(1):
        for name, build in NETWORKS.items():
            ways = {way: training(build, make) for way, make in WAYS.items()}
            question = f"{NAMES[name]}, batch {BATCH}"
            results[question] = compare(ways, repeats=21, warm_up=2, clock=own)
            show(question, results[question])
    write("steps", results)


if __name__ == "__main__":
    main()
