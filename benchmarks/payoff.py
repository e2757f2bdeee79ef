"""What do zeros save in time?

    python -m benchmarks.payoff [layers] [networks]

Dense is 1. `raw` is the plain kernel as a user would call it, `csr @ x.T + bias` with the indices
that `to_sparse_csr` gives. A network's ceiling is its dense time, less that of its masked layers,
plus the time of the fastest raw kernel, dense included, for each of these.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50, vit_b_16

import parasparse as ps
from benchmarks.timing import Timing, compare, show, threads, write
from parasparse.acceleration import measure
from parasparse.acceleration.formats.format import FORMATS, Format, formats_of
from parasparse.acceleration.installing import installed, stored_or_masked
from parasparse.acceleration.weight.layers import Use
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from parasparse.targets.tensors import masked_tensors_of

Results = Iterator[tuple[str, dict[str, Timing]]]


def layers() -> Results:
    """One linear layer."""
    for outputs, inputs in ((4096, 4096), (3072, 768), (768, 3072)):
        for sparsity in (0.8, 0.9, 0.95, 0.98):
            dense = ps.squash(ps.sparsify(nn.Linear(inputs, outputs), ps.Prune(sparsity)))
            blocks = copy.deepcopy(dense)
            kept = torch.rand(outputs // 16, inputs // 16) >= sparsity
            with torch.no_grad():
                blocks.weight.normal_().mul_(kept.repeat_interleave(16, 0).repeat_interleave(16, 1))
            for rows in (1, 8, 197):
                x = torch.randn(rows, inputs)
                csr = dense.weight.detach().to_sparse_csr()
                fast = ps.accelerate(copy.deepcopy(dense), x)
                fast_blocks = ps.accelerate(copy.deepcopy(blocks), x)
                calls: dict[str, Callable[[], Tensor]] = {
                    "dense": partial(dense, x),
                    "raw": lambda csr=csr, x=x, b=dense.bias: (csr @ x.t()).t().contiguous() + b,
                    "accelerated": partial(fast, x),
                    "accelerated, 16 x 16 blocks": partial(fast_blocks, x),
                }
                agrees(dense, fast, x)
                agrees(blocks, fast_blocks, x)
                chosen = {n: _format(m, rows) for n, m in (("", fast), (" blocks", fast_blocks))}
                named = ", ".join(f"{n} {f}".strip() for n, f in chosen.items())
                question = f"{outputs} x {inputs}, {sparsity:.0%}, {rows} rows ({named})"
                yield question, compare(calls, repeats=51)


def _format(layer: nn.Module, rows: int) -> str:
    return next(r.format or "dense" for r in ps.accelerated(layer) if r.rows == rows)


class Decoder(nn.Module):
    """Generates one token at a time, with the keys and values of earlier ones."""

    def __init__(self, size: int = 1024, heads: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, size)
        self.layers = nn.ModuleList(DecoderLayer(size, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 1000)

    def forward(self, token: Tensor) -> Tensor:
        caches: list[list[Tensor]] = [[] for _ in self.layers]
        for _ in range(8):
            x = self.embedding(token)
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer(x, cache)
            scores = self.head(self.norm(x))
            token = scores.argmax(-1)
        return scores


class DecoderLayer(nn.Module):
    """Attention to earlier tokens, and two linear layers."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.qkv(self.norm1(x)).view(len(x), 1, 3, self.heads, -1))
        q, k, v = torch.cat(cache, 1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
        x = x + self.out(mixed.flatten(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A two-layer LSTM."""

    def __init__(self, size: int = 1024) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10_000, size), nn.Linear(size, 10_000)
        self.lstm = nn.LSTM(size, size, num_layers=2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def networks() -> Results:
    """Networks with one sample; every weight except embeddings."""
    models = {
        "ViT-B/16": (lambda: vit_b_16(weights=None), torch.randn(1, 3, 224, 224), 11),
        "decoder, 8 tokens": (Decoder, torch.randint(1000, (1,)), 15),
        "LSTM language model, 35 tokens": (LanguageModel, torch.randint(10_000, (1, 35)), 15),
        "ResNet-50": (lambda: resnet50(weights=None), torch.randn(1, 3, 224, 224), 11),
    }
    for name, (build, x, repeats) in models.items():
        for sparsity in (0.8, 0.9, 0.95, 0.98):
            for number in (1, 2):
                torch.manual_seed(0)
                dense = build().eval()
                rules = {"*": sparsity}
                if hasattr(dense, "embedding"):
                    rules = {"embedding.weight": None, **rules}
                ps.squash(ps.sparsify(dense, rules))
                with threads(number):
                    fast = ps.accelerate(copy.deepcopy(dense), x)
                    agrees(dense, fast, x)
                    calls = {"dense": partial(dense, x), "accelerated": partial(fast, x)}
                    timings = compare(calls, repeats=repeats)
                    best = ceiling(dense, x, timings["dense"].median)
                timings["ceiling"] = Timing(best, best, best, best / timings["dense"].median)
                reached = best / timings["accelerated"].median
                yield (
                    f"{name}, {sparsity:.0%}, {number} thread(s), {reached:.2f} of the ceiling",
                    timings,
                )


def ceiling(model: nn.Module, x: Tensor, dense_ms: float) -> float:
    """Return the milliseconds that `model` would take with raw kernels in its sparse layers."""
    targets = {
        target.name: target
        for target in masked_tensors_of(model, pairs=False)
        if target.ndim > 1 and 2 * target.stored().count_nonzero() <= target.stored().numel()
    }
    originals = {name: stored_or_masked(target) for name, target in targets.items()}
    probes = {name: SparseWeight(original) for name, original in originals.items()}
    with installed(targets, probes):
        uses = measure.recorded(model, probes, x).uses
    total = dense_ms
    known: dict[str, tuple[float, float]] = {}
    for name, original in originals.items():
        for use in [use for use in uses[name] if use and use.rows]:
            key = repr((original.shape, use.like.shape, use.more[1:]))
            if key not in known:
                known[key] = dense_and_raw(original.detach(), use)
            dense, raw = known[key]
            total += use.times * (min(raw, dense) - dense)
    return total


def dense_and_raw(weight: Tensor, use: Use) -> tuple[float, float]:
    """Return the milliseconds of the dense kernel, and of the fastest raw one."""
    x = torch.randn(use.like.shape)
    calls: dict[str, Callable[[], object]] = {"dense": partial(use.func, x, weight, *use.more)}
    for name, made in formats_of(weight, FORMATS).items():
        if use.func is F.linear:
            calls[name] = partial(made.rows, x.flatten(0, -2), use.more[0])
        else:
            calls[name] = lambda made=made: convolved(made, x, weight, use)
    csr = weight.flatten(1).to_sparse_csr()
    if use.func is F.linear:
        calls["raw"] = lambda: csr @ x.flatten(0, -2).t()
    times = compare(calls, repeats=9)
    return times.pop("dense").median, min(timing.median for timing in times.values())


def convolved(made: Format, x: Tensor, weight: Tensor, use: Use) -> Tensor:
    """Return W @ patches in the shortest form."""
    _, stride, padding, dilation, _ = use.more
    if weight.shape[2:] == (1, 1):
        patches = x[:, :, :: stride[0], :: stride[1]].flatten(2)[0]
    else:
        patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)[0]
    return made.columns(patches)


def agrees(dense: nn.Module, fast: nn.Module, x: Tensor) -> None:
    """Check that the outputs are equal, up to the order of sums."""
    torch.testing.assert_close(fast(x), dense(x), rtol=1e-3, atol=1e-4)


QUESTIONS = {"layers": layers, "networks": networks}


@torch.no_grad()
def main(asked: list[str]) -> None:
    warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")
    results = {}
    for name in asked or QUESTIONS:
        for question, timings in QUESTIONS[name]():
            show(question, timings)
            results[question] = timings
    if not asked:
        write("payoff", results)


if __name__ == "__main__":
    main(sys.argv[1:])
