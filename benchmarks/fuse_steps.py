"""What does each step of `fuse` save, and what is left when the products take no time?

    python -m benchmarks.fuse_steps

ResNet-50, one image, one thread, with the compiled kernel in every column. *no products* is the
fused network with convolutions whose weights are all zero: it still writes, adds and pools.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import parasparse as ps
from benchmarks.networks import images
from benchmarks.timing import QUICK, compare, show, threads, write

SPARSITIES = (0.9,) if QUICK else (0.8, 0.9, 0.95)
FUSE = sys.modules["parasparse.acceleration.fuse"]
# What each column has in place of steps of `fuse`.
NO_SUMS = {"_with_what_follows": lambda *_: None}
INSTEAD = {
    "folded": {**NO_SUMS, "_max_pool2d": F.max_pool2d},
    "and pooling": NO_SUMS,
    "and sums, ReLU": {},
}


def squashed(sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    return ps.squash(ps.sparsify(models.resnet50().eval(), sparsity))


def processor(function: Callable[[], Any]) -> float:
    """Return the milliseconds of processor time of one call."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


def fused(model: nn.Module, x: Tensor, instead: dict[str, Any]) -> nn.Module:
    with mock.patch.multiple(FUSE, **instead) if instead else nullcontext():
        network = ps.fuse(model)
    return ps.accelerate(network, x, compile_kernel=True)


def no_products(model: nn.Module, x: Tensor) -> nn.Module:
    network = ps.fuse(model)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
    return ps.accelerate(network, x, compile_kernel=True)


@torch.no_grad()
def main() -> None:
    x, results = images(1), {}
    with threads(1):
        for sparsity in SPARSITIES:
            model = squashed(sparsity)
            networks = {name: fused(model, x, instead) for name, instead in INSTEAD.items()}
            networks["no products"] = no_products(model, x)
            expected = model(x)
            for name in INSTEAD:
                torch.testing.assert_close(networks[name](x), expected, rtol=1e-3, atol=1e-3)
            calls = {name: lambda net=net: net(x) for name, net in networks.items()}
            question = f"ResNet-50, {sparsity:.0%}"
            results[question] = compare(calls, repeats=25, clock=processor)
            show(question, results[question])
    write("fuse_steps", results)


if __name__ == "__main__":
    main()
