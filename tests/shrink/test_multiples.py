"""`multiple_of`: sizes that change are multiples of a number."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from parasparse.shrink.parts import spread
from tests.shrink.test_gates import Normed
from tests.shrink.test_shrink import (
    Attention,
    Gated,
    Grouped,
    Joined,
    Recurrent,
    Residual,
    assert_same,
    filters,
)


class GroupedQueries(nn.Module):
    """Attention in which two heads of queries share keys and values."""

    def __init__(self):
        super().__init__()
        self.heads, self.groups, self.width = 8, 4, 3
        self.q, self.out = nn.Linear(8, 24), nn.Linear(24, 8)
        self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k, v = (
            layer(x).view(batch, length, self.groups, self.width).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def deep():
    return nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 3)
    )


def flat():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3),
        nn.Flatten(), nn.Linear(40, 16), nn.GELU(), nn.Linear(16, 3),
    )  # fmt: skip


CASES = {
    "linear": (deep, (6,)),
    "flatten": (flat, (3, 4, 4)),
    "residual": (Residual, (3, 4, 4)),
    "batchnorm": (Normed, (3, 4, 4)),
    "grouped": (Grouped, (3, 5, 5)),
    "joined": (Joined, (6,)),
    "gated": (Gated, (6,)),
    "attention": (Attention, (5, 8)),
    "grouped queries": (GroupedQueries, (5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM, 12), (4, 5)),
    "resnet": (lambda: nn.Sequential(Normed().stem, Residual().one, Residual().two), (3, 4, 4)),
}


def built(name, masks):
    torch.manual_seed(2)
    build, shape = CASES[name]
    model, x = build().double().eval(), torch.randn(3, *shape).double()
    if masks == "filters":
        layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        rules = {layer: filters(0.6) for layer in layers[:-1]}
    else:
        units = ps.coupled(model, x)
        score = lambda tensor, name: torch.rand(tensor.shape)  # noqa: E731
        rules = {units.reaches: ps.Prune(0.6, pattern=units, scope="global", score=score)}
    return ps.sparsify(model, rules), x


def sizes(model):
    """All sizes; those of a convolution count all its inputs, not those of one group."""
    found = {n: p.shape for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[f"{name}.weight"] = (module.out_channels, module.in_channels)
    return found


def entries(row):
    """Which entries of the full tensor stay."""
    return spread(torch.ones(row.new_shape), row, torch.zeros(row.shape)) > 0


FILTERS = [name for name in CASES if name not in ("attention", "grouped queries", "lstm")]


@pytest.mark.parametrize("number", [2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize(
    ("name", "masks"), [*((n, "units") for n in CASES), *((n, "filters") for n in FILTERS)]
)
def test_sizes_that_change_are_multiples_and_nothing_is_lost(name, number, masks):
    model, x = built(name, masks)
    free = {row.name: row for row in ps.plan_shrink(model, x).rows}
    assert free
    plan = ps.plan_shrink(model, x, multiple_of=number)
    assert all(entries(row)[entries(free[row.name])].all() for row in plan.rows)
    assert plan.rows or number > 2
    if plan.rows:
        masked = copy.deepcopy(model)
        ps.shrink(model, x, multiple_of=number)
        assert_same(model, masked, x, torch.randn_like(x))
        before = sizes(ps.squash(masked))
        for tensor, shape in sizes(ps.squash(model)).items():
            pairs = zip(before[tensor], shape, strict=True)
            assert all(new == old or new % number == 0 for old, new in pairs), tensor


def test_reasons_name_the_multiple():
    model, x = built("linear", "units")
    plan = ps.plan_shrink(model, x, multiple_of=8)
    assert [row.new_shape for row in plan.rows] == [(16, 6), (16,), (8, 16), (8,), (3, 8)]
    assert {row.reason for row in plan.kept_back} == {"sizes are multiples of 8"}
