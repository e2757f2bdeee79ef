"""Channels of groups that are shuffled keep the order in which the smaller network has them."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from parasparse.shrink.needed import distinct


def by_views(x):
    n, channels, *places = x.shape
    return x.view(n, 2, channels // 2, *places).transpose(1, 2).reshape(n, channels, *places)


SHUFFLES = {"channel_shuffle": lambda x: F.channel_shuffle(x, 2), "views": by_views}
# Inputs of the last layer: of both groups or of one, at the same places and at others.
DROPPED = [(0, 1, 2, 3), (0, 1, 6, 7), (0, 2, 4, 6), (1, 3, 4, 6), (1, 4, 5, 6)]


class Shuffled(nn.Module):
    """A network that shuffles eight channels of two groups."""

    def __init__(self, shuffle):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 3, 1)
        self.double()
        self.shuffle = shuffle

    def forward(self, x):
        return self.last(self.shuffle(self.first(x)).sigmoid())


def images(number):
    return torch.randn(number, 2, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
def test_inputs_that_nobody_reads_go_only_if_the_order_stays(shuffle):
    model = Shuffled(shuffle)
    removed = []
    for dropped in DROPPED:
        masked = copy.deepcopy(model)
        with torch.no_grad():
            masked.last.weight[:, dropped] = 0
        if not ps.plan_shrink(masked, images(1)).rows:
            continue
        smaller, x = copy.deepcopy(masked), images(2)
        ps.shrink(smaller, images(1))
        torch.testing.assert_close(smaller(x), masked(x), rtol=1e-10, atol=1e-12)
        removed.append(8 - smaller.last.in_channels)
    assert max(removed) == 4


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
def test_coupled_takes_the_channels_of_all_groups_at_one_place(shuffle):
    model, x = Shuffled(shuffle), images(2)
    units = ps.coupled(model, images(1))
    assert repr(units) == "coupled(4 units in 3 tensors)"
    ps.sparsify(model, units.rules(0.5))
    want = model(x)
    ps.shrink(model, images(1))
    assert model.last.in_channels == 4
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)


class Turned(nn.Module):
    """Puts three dimensions of the channels in another order; each of them may become smaller."""

    def __init__(self, order):
        super().__init__()
        self.order, self.one, self.two, self.three = order, 2, 2, 3

    def forward(self, x):
        n, channels, *places = x.shape
        x = x.view(n, self.one, self.two, self.three, *places)
        return x.permute(0, *self.order, 4, 5).reshape(n, channels, *places)


class ThreeDimensions(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 12, 1), nn.Conv2d(12, 3, 1)
        self.turn = Turned(order)
        self.double()

    def forward(self, x):
        return self.last(self.turn(self.first(x)).sigmoid())


ORDERS = list(itertools.permutations((1, 2, 3)))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_three_dimensions_in_another_order_lose_what_keeps_the_order(order):
    generator = torch.Generator().manual_seed(0)
    model, x = ThreeDimensions(order), images(2)
    kept = torch.zeros(2, 2, 3, dtype=torch.bool)
    kept[1, :, [0, 2]] = True
    corner = torch.ones(2, 2, 3, dtype=torch.bool)
    corner[[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 0]] = False  # two of each row, at other places
    for live in (kept, corner, *(torch.rand(4, 2, 2, 3, generator=generator) > 0.6)):
        masked = copy.deepcopy(model)
        with torch.no_grad():
            masked.last.weight.mul_(live.permute([d - 1 for d in order]).reshape(1, -1, 1, 1))
        if not ps.plan_shrink(masked, images(1)).rows:
            assert live is not kept
            continue
        smaller = ps.shrink(copy.deepcopy(masked), images(1))
        torch.testing.assert_close(smaller(x), masked(x), rtol=1e-10, atol=1e-12)
        assert smaller.last.in_channels == 4 or live is not kept


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_coupled_takes_the_channels_at_one_place_of_the_longest_dimension(order):
    model, x = ThreeDimensions(order), images(2)
    units = ps.coupled(model, images(1))
    ps.sparsify(model, units.rules(0.5))
    want = model(x)
    ps.shrink(model, images(1))
    assert model.last.in_channels <= 8
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)


def test_a_shuffle_and_its_inverse_are_distinct():
    ids = torch.arange(1, 9)
    labels = [ids.view(shape).mT.reshape(2, 4) for shape in ((2, 4), (4, 2))]
    assert len(distinct([*labels, labels[0].clone()])) == 2
