"""What modules compute from their weights once, and read again in later calls."""

from functools import cached_property

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import assert_same


class Attention(nn.Module):
    """Attention with a bias for each head and distance, as in LeViT (2104.01136)."""

    def __init__(self):
        super().__init__()
        self.heads, self.cache, self.cached = 4, {}, None
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.biases = nn.Parameter(torch.randn(4, 5))
        self.register_buffer("distances", (torch.arange(5).view(-1, 1) - torch.arange(5)).abs())

    def computed(self):
        return self.biases[:, self.distances]

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) + self.bias()
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class InDict(Attention):
    def bias(self):
        if "biases" not in self.cache:
            self.cache["biases"] = self.computed()
        return self.cache["biases"]


class InAttribute(Attention):
    def bias(self):
        self.cached = self.computed() if self.cached is None else self.cached
        return self.cached


class InProperty(Attention):
    bias_table = cached_property(Attention.computed)

    def bias(self):
        return self.bias_table


class UntilModeIsSet(InDict):
    """As timm has it: `train` and `eval` return None."""

    def train(self, mode=True):
        super().train(mode)
        self.cache = {}


class Trains(InDict):
    """As `ultralytics.YOLO` has it: its `train` trains."""

    def train(self, data=None, **options):
        raise AssertionError("trained")

    def eval(self):
        return nn.Module.train(self, False)


def in_double(kind):
    module = kind().double()
    module.eval()
    return module


def dropped(model, x):
    """Drop two of the heads of `model`, and return what it computes without them."""
    units = ps.coupled(in_double(type(model)), x)
    ps.sparsify(model, units.rules(0.5))
    return model(x)


def inputs():
    return torch.randn(2, 5, 8, dtype=torch.float64)


@torch.no_grad()
def test_what_a_module_drops_when_its_mode_is_set_does_not_outlive_a_cut():
    model, x = in_double(UntilModeIsSet), inputs()
    model(x)
    want = dropped(model, x)
    model.out.train()
    plan = ps.plan_shrink(model, x)
    ps.shrink(model, x)
    assert model.biases.shape == (2, 5)
    assert [module.training for module in model.modules()] == [False, False, True]
    assert_same(model(x), want)
    ps.unshrink(model, plan)
    assert_same(model(x), want)


@pytest.mark.parametrize("kind", [InDict, InAttribute, InProperty])
@torch.no_grad()
def test_heads_stay_if_a_module_keeps_what_it_has_computed_for_them(kind):
    model, x = in_double(kind), inputs()
    model(x)
    want = dropped(model, x)
    with pytest.raises(ValueError, match="nothing can be removed"):
        ps.shrink(model, x)
    assert_same(model(x), want)


@pytest.mark.parametrize("kind", [InDict, InAttribute, InProperty, UntilModeIsSet, Trains])
@torch.no_grad()
def test_heads_go_of_a_module_that_has_not_run(kind):
    model, x = in_double(kind), inputs()
    ps.sparsify(model, ps.coupled(model, x).rules(0.5))
    ps.shrink(model, x)
    assert model.biases.shape == (2, 5)
