"""Norms over groups of channels: whole groups go, and the others keep equally many."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_norms import assert_same, filled


def grouped(groups, dead):
    torch.manual_seed(0)
    kept = torch.ones(6, dtype=torch.bool)
    kept[dead] = False
    net = nn.Sequential(nn.Conv1d(3, 6, 1), nn.GroupNorm(groups, 6), nn.Conv1d(6, 2, 1)).double()
    with torch.no_grad():
        for parameter in net[1].parameters():
            parameter.normal_()
    masks = dict.fromkeys(("0.bias", "1.weight", "1.bias"), kept)
    ps.sparsify(net, masks | {"0.weight": kept.view(-1, 1, 1), "2.weight": kept.view(1, -1, 1)})
    return net, kept.view(groups, -1).sum(1)


DEAD = [[5], [0, 1], [0, 2, 4], [0, 1, 2], [2, 3, 5], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_whole_groups_of_a_norm_go(groups, dead):
    net, left = grouped(groups, dead)
    masked, x = copy.deepcopy(net), torch.randn(2, 3, 5).double()
    plan = ps.plan_shrink(net, x)
    assert not plan.inexact
    assert bool(plan.rows) == bool((left == 0).any())
    if plan.rows:
        ps.shrink(net, x)
    assert net[1].num_groups == (left > 0).sum()
    assert net[1].num_channels == (left > 0).sum() * 6 // groups
    for each in (x, torch.randn(1, 3, 9).double()):
        torch.testing.assert_close(net(each), masked(each), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_of_a_norm_lose_equally_many_or_all(groups, dead):
    net, left = grouped(groups, dead)
    masked, x = copy.deepcopy(net), torch.randn(2, 3, 5).double()
    plan = ps.plan_shrink(net, x, exact=False)
    if plan.rows:
        ps.shrink(net, x, exact=False)
    assert net[1].num_groups == (left > 0).sum()
    assert net[1].num_channels == (left > 0).sum() * left.max()
    whole = int(left.max()) == 6 // groups  # no other channels are gone
    assert plan.inexact == (() if whole else ("1",))
    if whole:
        torch.testing.assert_close(net(x), masked(x))


class InGroups(nn.Module):
    """A residual stream under norms of groups, whose number is an attribute of each."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.three, self.four = nn.Conv2d(12, 8, 1, bias=False), nn.Linear(8, 5)
        self.norms = nn.ModuleList([nn.GroupNorm(4, 8), nn.GroupNorm(6, 12), nn.GroupNorm(2, 8)])

    def forward(self, x):
        x = self.one(x)
        h = self.two(self.norms[0](x).relu())
        x = x + self.three(nn.functional.silu(self.norms[1](h)))
        return self.four(self.norms[2](x).mean((2, 3)))


def test_groups_of_norms_are_units():
    model = filled(InGroups())
    x = torch.randn(2, 3, 6, 6).double()
    units = ps.coupled(model, x)
    ps.sparsify(model, units.rules(0.5))
    masked = copy.deepcopy(model)
    assert not ps.plan_shrink(model, x).inexact
    ps.shrink(model, x)
    assert [norm.num_groups for norm in model.norms] == [2, 3, 1]
    assert [norm.num_channels for norm in model.norms] == [4, 6, 4]
    assert_same(model, masked, torch.randn(1, 3, 4, 8).double())


def test_a_number_of_groups_that_the_program_states_stays():
    class Stated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)

        def forward(self, x):
            return self.two(nn.functional.group_norm(self.one(x), 4))

    units = ps.coupled(Stated(), torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="a size in group_norm in forward cannot follow"):
        units.rules(0.5)
