"""Models that call blocks in all the ways that models do, a treatment, and the plain way."""

import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import parasparse as ps
from parasparse.acceleration.measure import called


@dataclass(frozen=True)
class Wanda:
    """Per output, the entries with the largest |w| times the norm of their input."""

    sparsity: float | None = None
    statistics: Any = None
    pattern: Any = field(default=ps.patterns.unstructured, kw_only=True)

    def __call__(self, tensors):
        score = ps.scores.wanda(self.statistics)
        return {name: self.mask(score(tensor, name)) for name, tensor in tensors.items()}

    def mask(self, scores):
        if self.sparsity is None:
            return self.pattern(scores)
        return torch.stack([self.pattern(row, self.sparsity) for row in scores])


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, 8)

    def forward(self, x, *, scale=1.0, also=None):
        y = self.down(torch.relu(self.up(self.norm(x))))
        return x + y * scale + (0 if also is None else also)


class Chain(nn.Module):
    """Each block gets the output of the one before."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Between(Chain):
    """Something is computed between blocks, and given by keyword."""

    def forward(self, x, scale=2.0):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            x = layer(x=x.sin(), scale=torch.tensor(scale) / (1 + number))
        return self.head(x)


class Skips(Chain):
    """The last block also gets what the first returned, as in a U-Net."""

    def forward(self, x):
        first = self.layers[0](self.embed(x))
        x = self.layers[1](first)
        return self.head(self.layers[2](x, also=first.cos()))


class Repeats(Chain):
    """Blocks are called several times, in turn."""

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            x = self.layers[1](self.layers[0](x))
        return self.head(self.layers[2](x))


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x, cache):
        x.mul_(0.5)
        cache.append(self.inner(x))
        return x.add_(cache[-1] * len(cache))


class Writing(Chain):
    """The blocks write into their inputs, and into a cache."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Writes() for _ in range(3))

    def forward(self, x):
        x, cache = self.embed(x), []
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(x) + sum(map(torch.sum, cache))


class TwoStacks(nn.Module):
    """Encoder and decoder: each block of the decoder gets the output of the encoder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        memory = x = self.embed(x)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = layer(x, also=memory.tanh())
        return x


class Nested(Chain):
    """Arguments and results are nested."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(NestedBlock() for _ in range(3))

    def forward(self, x):
        state = {"x": (self.embed(x), [1])}
        for layer in self.layers:
            state = layer(state, flags=(True, None))
        return self.head(state["x"][0])


class NestedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, state, flags):
        x, counts = state["x"]
        return {"x": (self.inner(x), [*counts, len(flags)])}


MODELS = {
    "chain": Chain, "between": Between, "skips": Skips, "repeats": Repeats, "writing": Writing,
    "two_stacks": TwoStacks, "nested": Nested,
}  # fmt: skip


def batches(number=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 5, 6, generator=generator) for _ in range(number)]


def is_linear_in(start, name, module, tensor):
    return name.startswith(start) and tensor.ndim == 2 and hasattr(module, "bias")


def plainly(model, inputs, treatment, names, *, recompute=True):
    """Prune block by block with nothing but `collect` and `sparsify`."""
    dense = copy.deepcopy(model)
    for name in names:
        seen = model if recompute else dense
        target = partial(is_linear_in, f"{name}.")
        with torch.no_grad(), ps.scores.collect(seen, target, grams=True) as statistics:
            for x in inputs:
                called(seen, copy.deepcopy(x))
        ps.sparsify(model, {target: replace(treatment, statistics=statistics)})
    return model


def masks_of(model):
    return dict(ps.named_masks(model))


def assert_same(one, two):
    first, second = masks_of(one), masks_of(two)
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
