"""Equal blocks, compiled one by one: how long does the first step take, and how many frames?

    python -m benchmarks.blocks

`block.compile()` on 6 and on 12 residual blocks of two linear layers, with 90% of their weights
masked, then the first forward and backward, with empty caches. Blocks whose layers share their
classes share one compiled frame. A stock parametrization makes a class for each layer, so each
block is compiled again, up to torch's limit for one function (8). Blocks beyond it run uncompiled,
so the time is that of compiling fewer blocks.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrize, prune

import parasparse as ps
from benchmarks.networks import Where
from benchmarks.timing import Timing, compare, elapsed, own, show, write

SIZE = 256


class Block(nn.Module):
    """The feed-forward half of a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, 4 * SIZE), nn.Linear(4 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def by_prune(layer: nn.Linear, mask: Tensor) -> None:
    prune.custom_from_mask(layer, "weight", mask)


def by_fake_sparsity(layer: nn.Linear, mask: Tensor) -> None:
    parametrize.register_parametrization(layer, "weight", FakeSparsity(mask.float()))


def by_stock_where(layer: nn.Linear, mask: Tensor) -> None:
    parametrize.register_parametrization(layer, "weight", Where(mask))


def by_parasparse(layer: nn.Linear, mask: Tensor) -> None:
    ps.sparsify(layer, {"weight": mask})


WAYS: dict[str, Callable[[nn.Linear, Tensor], None]] = {
    "dense": lambda layer, mask: None,
    "torch.nn.utils.prune": by_prune,
    "torch.ao FakeSparsity": by_fake_sparsity,
    "stock where": by_stock_where,
    "parasparse": by_parasparse,
}


def blocks(number: int, way: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(number)))
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        WAYS[way](layer, torch.rand(layer.weight.shape) < 0.1)
    return model


def first_step(number: int, way: str, backend: str) -> tuple[float, int, bool]:
    """Return the milliseconds, the number of compiled frames, and whether the limit was reached."""
    model, x = blocks(number, way), torch.randn(2, 16, SIZE, requires_grad=True)
    expected = model(x).detach()
    torch._dynamo.reset()
    counters.clear()
    for block in model:
        block.compile(backend=backend)
    with fresh_cache():
        took = elapsed(lambda: model(x).square().mean().backward())
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    limit = any("recompile limit" in reason for reason in counters["unimplemented"])
    return took, counters["frames"]["ok"], limit


def first_steps(
    number: int, backend: str
) -> tuple[dict[str, Timing], dict[str, int], dict[str, bool]]:
    """Return the results of `first_step` for each way."""
    frames, limits = {}, {}

    def step(way: str) -> float:
        took, frames[way], limits[way] = first_step(number, way, backend)
        return took

    calls = {way: partial(step, way) for way in WAYS}
    return compare(calls, repeats=3, warm_up=0, clock=own), frames, limits


def main() -> None:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the limit is in the results
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    results, frames, limits = {}, {}, {}
    for backend in ("aot_eager", "inductor") if compiler else ("aot_eager",):
        first_step(1, "dense", backend)  # starts everything that starts once per process
        for number in (6, 12):
            question = f"{backend}, {number} blocks"
            results[question], frames[question], limits[question] = first_steps(number, backend)
            show(question, results[question])
            print("  frames:", frames[question], "limit reached:", limits[question])
    write("blocks", results, frames=frames, limit_reached=limits)


if __name__ == "__main__":
    main()
