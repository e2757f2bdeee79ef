"""Outputs of a model in any object: their channels stay, and so does what they are computed of."""

import copy
from collections import deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.shrink.running import tensors_in

Pair = namedtuple("Pair", ["x", "hidden"])


@dataclass
class Data:
    x: torch.Tensor
    hidden: torch.Tensor


class Plain:
    def __init__(self, x, hidden):
        self.parts = [x]
        self.hidden, self.owner = hidden, self


class Attributes(dict):
    """A mapping whose values are attributes as well."""


OUTPUTS = {
    "tuple": lambda x, h: (x, None, h),
    "namedtuple": Pair,
    "nested": lambda x, h: {"a": [x, {"h": h}], "b": None},
    "deque": lambda x, h: deque([x, h]),
    "dataclass": Data,
    "object": Plain,
    "namespace": lambda x, h: SimpleNamespace(x=x, h=h),
    "mapping": lambda x, h: Attributes(x=x, h=h),
    "object in a tuple": lambda x, h: (x, Plain(x, h)),
    "distributions": lambda x, h: (torch.distributions.Normal(x, 1.0), Pair(h, None)),
}


class Returns(nn.Module):
    """Returns what `f` makes of its outputs and, if `both`, of its hidden channels."""

    def __init__(self, f, *, both=True):
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
        self.f, self.both = f, both

    def forward(self, x):
        h = self.one(x).relu()
        return self.f(self.two(h), h if self.both else None)


def half(model):
    return ps.sparsify(model.eval(), {"one": ps.Prune(0.5, pattern=ps.patterns.channel(0))})


@pytest.mark.parametrize("f", OUTPUTS.values(), ids=OUTPUTS)
def test_channels_of_outputs_stay_in_every_container(f):
    plan = ps.plan_shrink(half(Returns(f)), torch.randn(2, 5))
    assert not plan.rows
    assert {row.reason for row in plan.kept_back} == {"an output of the model"}


@pytest.mark.parametrize("f", OUTPUTS.values(), ids=OUTPUTS)
def test_what_outputs_depend_on_stays(f):
    model, x = half(Returns(f, both=False)), torch.randn(2, 5)
    expected = tensors_in(copy.deepcopy(model)(x))
    small = ps.shrink(model, x)
    assert small.two.weight.shape == (3, 4)
    torch.testing.assert_close(tensors_in(small(x)), expected)


@pytest.mark.parametrize("f", [lambda x, h: None, lambda x, h: (v for v in [x]), lambda x, h: 1.0])
def test_a_model_that_returns_no_tensor_is_refused(f):
    model, x = half(Returns(f)), torch.randn(2, 5)
    for verb in (ps.coupled, ps.plan_shrink, ps.shrink):
        with pytest.raises(ValueError, match="must return a tensor"):
            verb(model, x)
