"""`GradualPruning` counts units of `coupled` as `sparsify` does."""

import pytest
import torch
from torch import nn

import parasparse as ps


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def units_of(model):
    return ps.coupled(model, torch.randn(1, 4))


def pruned(model, units, sparsity, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    schedule = ps.schedules.Linear(0.0, 1.0, stop=steps)
    rules = units.rules(sparsity)
    pruner = ps.GradualPruning(model, rules, optimizer, schedule=schedule, every=1)
    widths = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        pruner.step()
        widths.append(int(ps.mask_of(model, "2.bias").sum()))
    return widths


def test_the_share_of_units_follows_the_schedule_and_the_rest_is_cut():
    model = wide()
    assert pruned(model, units_of(model), 0.75) == [13, 10, 7, 4]
    x = torch.randn(3, 4)
    want = model(x)
    ps.shrink(model, torch.randn(1, 4))
    assert [m.out_features for m in model[::2]] == [4, 4, 2]
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(("asked", "widths"), [(0.75, [7, 6, 5, 4]), (0.25, [8] * 4)])
def test_it_starts_from_the_share_of_units_that_are_gone(asked, widths):
    model = wide()
    units = units_of(model)
    ps.sparsify(model, units.rules(0.5))
    assert pruned(model, units, asked) == widths
