"""`targets` says which weights may lose channels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import assert_same, built, pruned


def test_only_weights_that_targets_reach_lose_channels():
    model, example, others = built("flatten")
    pruned(model, example)
    masked = copy.deepcopy(model)
    plan = ps.plan_shrink(model, example, targets=["6", "8"])
    assert {row.name for row in plan.rows} == {"6.weight", "6.bias", "8.weight"}
    reasons = {row.reason for row in plan.kept_back if row.name == "0.weight"}
    assert reasons == {"no target reaches 0.weight"}
    ps.shrink(model, example, targets=["6", "8"])
    assert_same(model, masked, example, others)


@pytest.mark.parametrize(
    "targets", [(nn.Conv2d, nn.Linear), "*", lambda name, module, tensor: True, ["*", "0.bias"]]
)
def test_targets_are_the_left_sides_of_rules(targets):
    model, example, _ = built("flatten")
    pruned(model, example)
    assert ps.plan_shrink(model, example, targets=targets) == ps.plan_shrink(model, example)


def test_a_target_that_reaches_nothing_is_an_error_with_the_nearest_names():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    for verb in (ps.shrink, ps.plan_shrink):
        with pytest.raises(ValueError, match=r'"0.wieght" reaches none .*nearest: "0.weight"'):
            verb(model, torch.randn(1, 4), targets="0.wieght")


@pytest.mark.parametrize("argument", [{"targets": "weight"}, {"exact": False}, {"multiple_of": 8}])
def test_arguments_that_decide_what_goes_are_refused_beside_a_plan(argument):
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}` must be left out with a plan"):
        ps.shrink(nn.Linear(2, 2), ps.Shrinkage(()), **argument)


def test_targets_of_coupled_limit_the_units():
    model, example, _ = built("flatten")
    units = ps.coupled(model, example, targets=["6", "8"])
    reached = {n for n, p in model.named_parameters() if units.reaches(n, model, p)}
    assert reached == {"6.weight", "6.bias", "8.weight"}
    with pytest.raises(ValueError, match=r'nearest: "6.weight"'):
        ps.coupled(model, example, targets="6.wieght")


STATED = {
    "view": lambda x: x.view(-1, 12),
    "view in two dimensions": lambda x: x.view(-1, 3, 4).flatten(1),
    "view of heads": lambda x: x.view(-1, 3, 4).softmax(-1).flatten(1),
    "split": lambda x: torch.cat([p * i for i, p in enumerate(x.split((5, 7), -1), 1)], -1),
    "narrow": lambda x: torch.cat([x.narrow(-1, 0, 5), 2 * x.narrow(-1, 5, 7)], -1),
    "slice": lambda x: torch.cat([x[:, :5], 2 * x[:, 5:]], -1),
    "select": lambda x: torch.stack([x[:, i] for i in range(12)], -1),
    "groups": lambda x: F.conv1d(x.unsqueeze(-1), torch.ones(12, 1, 1), groups=12).flatten(1),
}


class Stated(nn.Module):
    """A network whose program states a size of 12 as a number."""

    def __init__(self, state):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 2)
        self.state = state

    def forward(self, x):
        return self.c(self.state(self.b(self.a(x).relu()).relu()))


@pytest.mark.parametrize("state", STATED.values(), ids=STATED)
def test_coupled_offers_no_channels_whose_number_the_program_states(state):
    model, x = Stated(state), torch.randn(3, 4)
    units = ps.coupled(model, x)
    assert units.reaches("a.weight", model.a, model.a.weight)
    assert not units.reaches("c.weight", model.c, model.c.weight)
    ps.sparsify(model, units.rules(0.5))
    plan = ps.plan_shrink(model, x)
    assert plan.rows
    assert not plan.kept_back


class FromAttribute(Stated):
    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).view(-1, self.c.in_features))


def test_coupled_offers_channels_whose_number_an_attribute_states():
    model = FromAttribute(None)
    units = ps.coupled(model, torch.randn(3, 4))
    assert units.reaches("c.weight", model.c, model.c.weight)
