"""What do masks cost, compared with dense weights and with other ways to mask?

    python -m benchmarks.overhead [weights] [networks] [reading] [experts]

Peers: torch.nn.utils.prune and the FakeSparsity of torch.ao.pruning store float masks, 4 bytes per
entry, and multiply, so NaN stays NaN. Stock parametrizations use `where`, or a product, with a bool
mask.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torchvision.models import resnet18, vit_b_16

import parasparse as ps
from benchmarks.networks import Recurrent, Where
from benchmarks.timing import Timing, compare, show, threads, write

Read = Callable[[], Tensor]
Results = Iterator[tuple[str, dict[str, Timing]]]


class Product(Where):
    """The usual parametrization for a bool mask: a product."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


def linear(size: int) -> tuple[nn.Linear, Tensor]:
    """Return a layer of `size` weights and a mask that keeps a tenth of them."""
    rows = 1 << (size.bit_length() - 1) // 2
    layer = nn.Linear(size // rows, rows, bias=False)
    return layer, torch.rand(layer.weight.shape) < 0.1


def peers(layer: nn.Linear, mask: Tensor) -> dict[str, tuple[Read, nn.Parameter]]:
    """Return for each peer a function that reads the masked weight, and the stored Parameter."""
    found: dict[str, tuple[Read, nn.Parameter]] = {}
    pruned = copy.deepcopy(layer)
    prune.custom_from_mask(pruned, "weight", mask)
    (hook,) = pruned._forward_pre_hooks.values()  # each forward computes the weight in it

    def by_prune() -> Tensor:
        hook(pruned, None)
        return pruned.weight

    found["torch.nn.utils.prune"] = by_prune, pruned.weight_orig
    modules = {"torch.ao FakeSparsity": FakeSparsity(mask.float())}
    modules |= {"stock where": Where(mask), "stock product": Product(mask)}
    for name, module in modules.items():
        other = copy.deepcopy(layer)
        parametrize.register_parametrization(other, "weight", module)
        original = other.parametrizations.weight.original
        found[name] = (lambda other=other: other.weight), original
    ours = ps.sparsify(copy.deepcopy(layer), {"weight": mask})
    found["parasparse"] = (lambda: ours.weight), ours.parametrizations.weight.original
    return found


def weights() -> Results:
    """Read one weight, forward only and with backward, compared with a plain copy."""
    for exponent, repeats in ((18, 200), (20, 60), (24, 15)):
        layer, mask = linear(1 << exponent)
        grad = torch.randn_like(layer.weight)
        dense = layer.weight
        reads = {"clone": (dense.clone, dense), **peers(layer, mask)}
        both = {
            name: (lambda read=read, p=p, grad=grad: torch.autograd.grad(read(), p, grad))
            for name, (read, p) in reads.items()
        }
        for number in (1, 2):
            with threads(number):
                with torch.no_grad():
                    forward = {name: read for name, (read, _) in reads.items()}
                    question = f"2^{exponent} weights, {number} thread(s), forward"
                    yield question, compare(forward, repeats=repeats)
                yield f"{question} and backward", compare(both, repeats=repeats)


def reading() -> Results:
    """Read a small weight, compared with the operation on plain tensors."""
    layer, mask = linear(64 * 64)
    weight, floats = layer.weight, mask.float()
    reads = {
        "bare where": lambda: torch.where(mask, weight, 0.0),
        "bare product, float mask": lambda: weight * floats,
        "dense": lambda: layer.weight,
        **{name: read for name, (read, _) in peers(layer, mask).items()},
    }
    frozen = ps.sparsify(copy.deepcopy(layer), {"weight": mask})
    with threads(1):
        yield "reading one 64 x 64 weight, training", compare(reads, repeats=5_000)
        with torch.no_grad(), ps.frozen(frozen):
            more = {**reads, "parasparse, frozen": lambda: frozen.weight}
            yield "reading one 64 x 64 weight, evaluation", compare(more, repeats=5_000)


class Experts(nn.Module):
    """Fused experts in a loop, as in transformers: 8 experts, at most half of them, a token."""

    def __init__(self, number: int, tokens: int, size: int = 128, inner: int = 64) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(number, 2 * inner, size) / size**0.5)
        self.down = nn.Parameter(torch.randn(number, size, inner) / inner**0.5)
        self.chosen = torch.rand(tokens, number).topk(min(8, number // 2)).indices

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in self.chosen.unique().tolist():
            token = (self.chosen == expert).any(1).nonzero().squeeze(1)
            gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2, dim=-1)
            out.index_add_(0, token, F.linear(F.silu(gate) * up, self.down[expert]))
        return out


def experts() -> Results:
    """Modules that read a slice of a stack for each expert, with 64 tokens, compared with dense."""
    x = torch.randn(64, 128)
    for number, repeats in ((8, 60), (32, 30), (128, 15)):
        dense = Experts(number, len(x))
        masked = ps.sparsify(copy.deepcopy(dense), {"*": 0.8})
        with threads(1):
            pair = {"dense": partial(dense, x), "masked": partial(masked, x)}
            with torch.no_grad():
                yield f"{number} experts, evaluation", compare(pair, repeats=repeats)
            steps = {"dense": step(dense, x), "masked": step(masked, x)}
            yield f"{number} experts, training step", compare(steps, repeats=repeats)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a function that does one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def networks() -> Results:
    """Networks at 90%: evaluation with 1 and 8 samples, and a training step with 8."""
    models = {
        "ResNet-18": (lambda: resnet18(weights=None), (3, 224, 224), 9),
        "ViT-B/16": (lambda: vit_b_16(weights=None), (3, 224, 224), 5),
        "LSTM, 2 layers, 50 steps": (Recurrent, (50, 256), 15),
    }
    for name, (build, shape, repeats) in models.items():
        torch.manual_seed(0)
        dense = build().eval()
        masked = ps.sparsify(copy.deepcopy(dense), 0.9)
        squashed = ps.squash(copy.deepcopy(masked))
        frozen = copy.deepcopy(masked)
        for number in (1, 2):
            where = f"{name}, {number} thread(s)"
            with threads(number):
                for batch in (1, 8):
                    x = torch.randn(batch, *shape)
                    question = f"{where}, evaluation, batch {batch}"
                    pair = {"dense": partial(dense, x), "masked": partial(masked, x)}
                    # Separately, because memory that `masked` allocates evicts the caches.
                    others = {
                        "dense": partial(dense, x),
                        "masked, frozen": partial(frozen, x),
                        "squashed": partial(squashed, x),
                    }
                    with torch.no_grad(), ps.frozen(frozen):
                        yield question, compare(pair, repeats=repeats, warm_up=1)
                        once = compare(others, repeats=repeats, warm_up=1)
                        yield f"{question}, computed once", once
                x = torch.randn(8, *shape)
                steps = {"dense": step(dense.train(), x), "masked": step(masked.train(), x)}
                yield f"{where}, training step, batch 8", compare(steps, repeats=repeats, warm_up=1)
                dense.eval(), masked.eval()


QUESTIONS = {"weights": weights, "reading": reading, "networks": networks, "experts": experts}


def main(asked: list[str]) -> None:
    results = {}
    for name in asked or QUESTIONS:
        for question, timings in QUESTIONS[name]():
            show(question, timings)
            results[question] = timings
    if not asked:  # a single part replaces no results
        write("overhead", results)


if __name__ == "__main__":
    main(sys.argv[1:])
