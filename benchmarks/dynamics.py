"""What do controllers cost, per training step and per update?

    python -m benchmarks.dynamics

One update in 100 steps, compared with the same masks left unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import parasparse as ps
from benchmarks.networks import Recurrent
from benchmarks.timing import Timing, compare, show, threads, write

EVERY = 100
Results = Iterator[tuple[str, dict[str, Timing]]]
Make = Callable[[nn.Module, torch.optim.Optimizer, int], Any]


def gradual(model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> Any:
    return ps.GradualPruning(
        model, 0.9, optimizer, schedule=ps.schedules.Constant(1.0), every=every
    )


def evolutionary(model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> Any:
    return ps.sparse_evolutionary_training(model, 0.9, optimizer, every=every, init="constant")


def rigl(model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> Any:
    return ps.DynamicSparsity(
        model, 0.9, optimizer, growth="gradient", redistribution="none", prune_rate=0.3, every=every
    )


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> Any:
    return ps.DynamicSparsity(model, 0.9, optimizer, prune_rate=0.3, every=every)


CONTROLLERS: dict[str, Make] = {
    "GradualPruning": gradual,
    "SET": evolutionary,
    "RigL": rigl,
    "sparse momentum": momentum,
}
NEVER = 10**9


def training(model: nn.Module, x: Tensor, made: Any = None) -> Callable[[], None]:
    """Return a training step of `model`, with its own optimizer."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    controller = None if made is None else made(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        if controller is not None:
            controller.step()

    return step


def steps(model: nn.Module, x: Tensor) -> dict[str, Callable[[], None]]:
    """Return a step with static masks, a dense step, and two steps of each controller."""

    def fixed(model: nn.Module, _: object) -> None:
        ps.sparsify(model, 0.9)

    found = {"masks alone": training(model, x, fixed), "dense": training(model, x)}
    for name, make in CONTROLLERS.items():
        for kind, every in (("between", NEVER), ("update", 1)):
            found[f"{name}, {kind}"] = training(
                model, x, lambda m, o, make=make, every=every: make(m, o, every)
            )
    return found


def amortised(timings: dict[str, Timing]) -> dict[str, float]:
    """Return the average time of a step, relative to a step with unchanged masks."""
    return {
        name: ((EVERY - 1) * timings[f"{name}, between"].ratio + timings[f"{name}, update"].ratio)
        / EVERY
        for name in CONTROLLERS
    }


def networks() -> Iterator[tuple[str, nn.Module, Tensor]]:
    yield "ResNet-18, batch 8 of 224 x 224", resnet18(weights=None), torch.randn(8, 3, 224, 224)
    yield "LSTM, 2 layers of 512, batch 8 of 50 steps", Recurrent(), torch.randn(8, 50, 256)


def topk(weights: Tensor, k: int) -> object:
    return weights.abs().topk(k)


def updates() -> Results:
    """One update of ResNet-18's 11 M weights, compared with one topk of as many weights."""
    for number in (1, 2):
        model = resnet18(weights=None)
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
        k = weights.numel() // 10
        functions: dict[str, Callable[[], object]] = {"topk": partial(topk, weights, k)}
        for name, make in CONTROLLERS.items():
            own = copy.deepcopy(model)
            optimizer = torch.optim.SGD(own.parameters(), 1e-4, momentum=0.9)
            controller = make(own, optimizer, 1)
            own(torch.randn(2, 3, 64, 64)).square().mean().backward()
            optimizer.step()
            functions[name] = _update(controller)
        with threads(number):
            yield (
                f"one update of {weights.numel():,} weights, {number} thread(s)",
                compare(functions, repeats=9, warm_up=1),
            )


def _update(controller: Any) -> Callable[[], None]:
    """Return a mask update that uses the dense gradient of one backward pass."""
    gradients = getattr(controller, "_gradients", None)

    def update() -> None:
        if gradients is not None:
            controller._gradients = gradients
        controller._update(1)

    return update


def main() -> None:
    torch.manual_seed(0)
    results, shares = {}, {}
    for name, model, x in networks():
        for number in (1, 2):
            with threads(number):
                question = f"training step, {name}, {number} thread(s)"
                results[question] = compare(steps(model, x), repeats=9, warm_up=1)
            show(question, results[question])
            shares[question] = amortised(results[question])
            for controller, ratio in shares[question].items():
                print(f"  {controller}, an update every {EVERY} steps: x {ratio:.3f}", flush=True)
    for question, timings in updates():
        results[question] = timings
        show(question, timings)
    write("dynamics", results, amortised=shares)


if __name__ == "__main__":
    main()
