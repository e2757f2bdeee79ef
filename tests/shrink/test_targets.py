"""`targets` says which weights may lose channels."""

import copy

import pytest
import torch
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


def test_a_plan_takes_no_targets():
    with pytest.raises(ValueError, match="must be None with a plan"):
        ps.shrink(nn.Linear(2, 2), ps.Shrinkage(()), targets="weight")


def test_targets_of_coupled_limit_the_units():
    model, example, _ = built("flatten")
    units = ps.coupled(model, example, targets=["6", "8"])
    reached = {n for n, p in model.named_parameters() if units.reaches(n, model, p)}
    assert reached == {"6.weight", "6.bias", "8.weight"}
    with pytest.raises(ValueError, match=r'nearest: "6.weight"'):
        ps.coupled(model, example, targets="6.wieght")
