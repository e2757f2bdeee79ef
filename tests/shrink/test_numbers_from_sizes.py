"""Numbers that a program computes from the size of a head: whole heads go, their size stays."""

import copy
import math

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import assert_same

HEADS, SIZE = 4, 6


class Attention(nn.Module):
    """Computes a number from its queries (batch, heads, tokens, entries of a head)."""

    def __init__(self, number):
        super().__init__()
        self.number, self.heads = number, HEADS
        self.q, self.k, self.v = (nn.Linear(5, HEADS * SIZE) for _ in range(3))
        self.last = nn.Linear(HEADS * SIZE, 3)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.mT * self.number(q)).softmax(-1)
        return self.last((weights @ v).transpose(1, 2).flatten(2))


def built(number):
    torch.manual_seed(0)
    return Attention(number).double().eval(), torch.randn(2, 5, 5, dtype=torch.double)


OF_THE_SIZE = {
    "sqrt": lambda q: 1.0 / math.sqrt(q.size(-1)),
    "power": lambda q: q.shape[-1] ** -0.5,
    "square": lambda q: (q.shape[-1] ** -0.25) ** 2,
    "quotient": lambda q: 1 / q.size(3),
}
OF_HEADS = {
    "heads": lambda q: q.shape[1] ** -0.5,
    "both": lambda q: (q.shape[1] * q.shape[-1]) ** -0.5,
    "channels": lambda q: q.transpose(1, 2).flatten(2).shape[-1] ** -0.5,
}


@pytest.mark.parametrize("number", OF_THE_SIZE.values(), ids=OF_THE_SIZE)
def test_heads_go_where_a_number_follows_from_their_size(number):
    model, x = built(number)
    units = ps.coupled(model, x)
    ps.sparsify(model, units.rules(0.5))
    masked = copy.deepcopy(model)
    ps.shrink(model, x)
    assert (model.heads, model.last.in_features) == (HEADS // 2, HEADS * SIZE // 2)
    assert_same(model, masked, x, torch.randn(3, 7, 5, dtype=torch.double))


@pytest.mark.parametrize("number", OF_HEADS.values(), ids=OF_HEADS)
def test_heads_stay_where_a_number_follows_from_how_many_there_are(number):
    with pytest.raises(ValueError, match="comput"):
        ps.coupled(*built(number)).rules(0.5)


class Split(nn.Module):
    """Channels that are shaped (heads, entries) while they are multiplied by a number."""

    def __init__(self, number):
        super().__init__()
        self.number, self.heads = number, HEADS
        self.first, self.last = nn.Linear(5, HEADS * SIZE), nn.Linear(HEADS * SIZE, 3)

    def forward(self, x):
        y = self.first(x).unflatten(1, (self.heads, -1))
        return self.last((y * self.number(y)).flatten(1))


NUMBERS = {  # and whether heads and entries of heads may go
    "constant": (lambda y: 0.4, True, True),
    "size": (lambda y: y.shape[2] ** -0.5, True, False),
    "heads": (lambda y: y.shape[1] ** -0.5, False, True),
    "both": (lambda y: (y.shape[1] * y.shape[2]) ** -0.5, False, False),
}


@pytest.mark.parametrize("what", ["heads", "entries"])
@pytest.mark.parametrize("name", NUMBERS)
def test_only_what_leaves_the_number_as_it_is_goes(name, what):
    torch.manual_seed(0)
    number, heads, entries = NUMBERS[name]
    model, x = Split(number).double().eval(), torch.randn(2, 5, dtype=torch.double)
    dead = torch.zeros(HEADS, SIZE, dtype=torch.bool)
    dead[(slice(2), slice(None)) if what == "heads" else (slice(None), slice(3))] = True
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter[dead.flatten()] = 0
    masked = copy.deepcopy(model)
    goes = heads if what == "heads" else entries
    assert bool(ps.plan_shrink(model, x).rows) == goes
    if goes:
        ps.shrink(model, x)
        assert model.first.out_features == HEADS * SIZE // 2
        assert_same(model, masked, x)


def test_units_are_whole_heads_where_a_number_follows_from_their_size():
    torch.manual_seed(0)
    model, x = Split(OF_THE_SIZE["sqrt"]).double().eval(), torch.randn(2, 5, dtype=torch.double)
    ps.sparsify(model, ps.coupled(model, x).rules(0.5))
    masked = copy.deepcopy(model)
    ps.shrink(model, x)
    assert (model.heads, model.last.in_features) == (HEADS // 2, HEADS * SIZE // 2)
    assert_same(model, masked, x)
