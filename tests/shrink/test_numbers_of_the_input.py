"""Python numbers that come from the input, or from its size, are no constants."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import parasparse as ps


class Between(nn.Module):
    """Does `f` to hidden channels and another input between two layers."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, number):
        return self.two(self.f(self.one(x), number))


def given(number, kind):
    """Return a number as an input of a kind."""
    return kind(number) if kind in (int, float) else torch.tensor([number], dtype=kind)


NUMBERS = {
    "float": (float, lambda h, n: h * n),
    "int": (int, lambda h, n: h * n),
    "added": (int, lambda h, n: F.relu(h - n)),
    "filled": (int, lambda h, n: h + torch.full((), n, dtype=h.dtype)),
    "clamped": (int, lambda h, n: (h * 9).clamp(max=n)),
    "alpha": (int, lambda h, n: torch.add(h, torch.ones_like(h), alpha=n)),
    "tensor": (int, lambda h, n: h * torch.tensor(n)),
    "divided": (int, lambda h, n: h * torch.div(n, 2)),  # without a tensor
    "item": (torch.double, lambda h, n: h * n.item()),
    "item of an int": (torch.long, lambda h, n: h / int(n.sum())),
    "tolist": (torch.long, lambda h, n: h * n.tolist()[0]),
    "numpy": (torch.double, lambda h, n: h * float(n.numpy()[0])),
}


def filters_alone(model):
    """Filters are dropped, and their biases are not, so that they are constants."""
    rule = ps.Prune(0.5, pattern=ps.patterns.channel(0, norm=2))
    return ps.sparsify(model.double().eval(), {"one": rule})


@pytest.mark.parametrize("name", NUMBERS)
def test_constants_that_depend_on_a_number_are_not_folded(name):
    kind, f = NUMBERS[name]
    torch.manual_seed(0)
    masked, x = filters_alone(Between(f)), torch.randn(2, 4, 5).double()
    plan = ps.plan_shrink(masked, (x, given(3, kind)))
    if not plan.rows:
        return
    small = ps.shrink(copy.deepcopy(masked), (x, given(3, kind)))
    for number in (3, 5):
        inputs = (x, given(number, kind))
        torch.testing.assert_close(small(*inputs), masked(*inputs))


def test_channels_that_are_zero_go_although_a_number_is_read():
    model, x = Between(lambda h, n: F.relu6(h * n).pow(2) / 2), torch.randn(2, 4, 5)
    units = ps.coupled(model, (x, 3.0))
    masked = ps.sparsify(model.eval(), units.rules(0.5))
    small = ps.shrink(copy.deepcopy(masked), (x, 3.0))
    assert small.two.weight.shape == (3, 4)
    torch.testing.assert_close(small(x, 5.0), masked(x, 5.0))


OVER_PLACES = {
    "sum": lambda h, _: h.sum(1),
    "product": lambda h, _: h.prod(1),
    "logsumexp": lambda h, _: h.logsumexp(1),
    "norm": lambda h, _: h.norm(dim=1),
    "running sum": lambda h, _: h.cumsum(1),
    "mean": lambda h, _: h.mean(1),
    "largest": lambda h, _: h.amax(1),
    "deviation": lambda h, _: h.std(1),
}


@pytest.mark.parametrize("f", OVER_PLACES.values(), ids=OVER_PLACES)
def test_constants_over_places_hold_for_another_number_of_places(f):
    torch.manual_seed(0)
    masked, x = filters_alone(Between(f)), torch.randn(2, 4, 5).double()
    small = copy.deepcopy(masked)
    if ps.plan_shrink(masked, (x, None)).rows:
        ps.shrink(small, (x, None))
    for places in (4, 7):
        x = torch.randn(3, places, 5).double()
        torch.testing.assert_close(small(x, None), masked(x, None))


class Packed(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(5, 8), nn.LSTM(8, 6, 2), nn.Linear(6, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.first(x).relu(), lengths, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.rnn(packed)[0])[0])


def test_packed_sequences_keep_their_channels():
    model, inputs = Packed().eval(), (torch.randn(4, 3, 5), torch.tensor([2, 4, 1]))
    ps.sparsify(model, {nn.Linear: ps.Prune(0.5, pattern=ps.patterns.channel(0))})
    plan = ps.plan_shrink(model, inputs)
    assert {row.name for row in plan.kept_back} >= {"first.weight", "last.weight"}


DECIDED = {
    "if": lambda h, n: h.relu() if n.sum() > 0 else h.tanh(),
    "item": lambda h, n: h.relu() if n.max().item() > 0 else h.tanh(),
    "any": lambda h, n: h.relu() if bool((n > 0).any()) else h.tanh(),
    "places": lambda h, n: h[n.nonzero()[:, 0]],
}


@pytest.mark.parametrize("f", DECIDED.values(), ids=DECIDED)
def test_a_plan_names_the_places_where_values_may_have_decided(f):
    model, inputs = filters_alone(Between(f)), (torch.randn(1, 5).double(), torch.ones(1))
    plan = ps.plan_shrink(model, inputs)
    assert all(place.endswith("in forward") for place in plan.branches)
    assert plan.branches
    same = ps.plan_shrink(filters_alone(Between(lambda h, n: h.relu())), inputs)
    assert not same.branches
