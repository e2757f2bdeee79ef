"""What do masks cost? ResNet-18 forward and training step, masked against dense and squashed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import parasparse as ps
from benchmarks._timing import compare, write


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def main() -> None:
    torch.manual_seed(0)
    dense = resnet18(weights=None).eval()
    masked = ps.sparsify(copy.deepcopy(dense), 0.9)
    squashed = ps.squash(copy.deepcopy(masked))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        forward = {
            "dense": lambda: dense(x),
            "masked": lambda: masked(x),
            "squashed": lambda: squashed(x),
        }
        results = {"resnet18 forward, batch 1": compare(forward)}
        with ps.frozen(masked):
            frozen = {"dense": lambda: dense(x), "masked, frozen": lambda: masked(x)}
            results["resnet18 forward, batch 1, frozen"] = compare(frozen)
    batch = torch.randn(8, 3, 224, 224)
    train = {"dense": step(dense.train(), batch), "masked": step(masked.train(), batch)}
    results["resnet18 training step, batch 8"] = compare(train, repeats=7)
    layer, sparse = nn.Linear(64, 64), ps.sparsify(nn.Linear(64, 64), 0.9)
    read = {"dense": lambda: layer.weight, "masked": lambda: sparse.weight}
    results["reading one 64 x 64 weight"] = compare(read, repeats=2_000)
    print("written:", write("overhead", results).name)


if __name__ == "__main__":
    main()
