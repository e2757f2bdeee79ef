"""Warnings: tensors that a rule empties, and weights that a sparsity alone misses."""

import warnings

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.patterns import block, channel


def net():
    """Return a model whose first layer has the lowest weights."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    return model


EMPTIED = {
    "global": (net, ps.Prune(0.9, scope="global"), '"0.weight"'),
    "global channels": (net, ps.Prune(0.9, scope="global", pattern=channel(0)), '"0.weight"'),
    "rounding": (lambda: nn.Linear(2, 2), 0.9, '"weight"'),
    "blocks larger than a tensor": (
        lambda: nn.Linear(8, 1),
        ps.Prune(0.9, pattern=block((4, 16))),
        '"weight"',
    ),
    "a distribution": (
        net,
        ps.Prune(0.5, distribution=lambda shapes, s: dict.fromkeys(shapes, 1.0)),
        '"0.weight", "1.weight"',
    ),
}


@pytest.mark.parametrize(("build", "rule", "names"), EMPTIED.values(), ids=EMPTIED.keys())
def test_what_is_emptied_is_named_once(build, rule, names):
    with pytest.warns(UserWarning, match=f"no entry is left of {names}: .*max_sparsity") as caught:
        model = ps.sparsify(build(), rule)
    assert [warning.filename for warning in caught] == [__file__]
    ps.sparsify(model, rule)  # it was empty before
    ps.plan(build(), rule)  # shows it in its table


def test_what_was_meant_is_no_surprise():
    ps.sparsify(net(), 1.0)
    ps.sparsify(net(), ps.Prune(1.0, scope="global"))
    ps.sparsify(net(), {"0.weight": torch.zeros(20, 20)})
    ps.sparsify(net(), ps.Prune(0.9, scope="global", max_sparsity=0.99))
    layer = nn.Linear(8, 8)
    layer.more = nn.Parameter(torch.empty(0, 8))  # nothing could be left of it
    ps.sparsify(layer, ps.Prune(0.5, scope="global"))


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = net()
    with pytest.raises(UserWarning, match="no entry is left"):
        ps.sparsify(model, ps.Prune(0.9, scope="global"))
    assert not ps.is_sparse(model)


def test_controllers_warn_when_an_update_empties_a_tensor():
    rule = ps.Prune(0.9, scope="global")
    schedule = ps.schedules.Linear(0.0, 1.0, stop=2)
    pruner = ps.GradualPruning(net(), rule, schedule=schedule, every=1)
    pruner.step()
    with pytest.warns(UserWarning, match='no entry is left of "0.weight"') as caught:
        pruner.step()
    pruner.step()  # nothing changes any more
    lottery = ps.LotteryTicket(net(), rule, rounds=1)
    with pytest.warns(UserWarning, match='no entry is left of "0.weight"') as also:
        lottery.prune()
    assert [(w.filename, len(c)) for c in (caught, also) for w in c] == [(__file__, 1)] * 2


class Flat(nn.Module):
    """Keeps its weights in a vector, which a sparsity alone does not reach."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(64))
        self.fc = nn.Linear(8, 8, bias=False)


CONTROLLERS = {
    "sparsify": lambda model, rule: ps.sparsify(model, rule),
    "GradualPruning": lambda model, rule: ps.GradualPruning(
        model, rule, schedule=ps.schedules.Constant(1.0), every=1
    ),
    "LotteryTicket": lambda model, rule: ps.LotteryTicket(model, rule, rounds=2),
    "DynamicSparsity": lambda model, rule: ps.DynamicSparsity(
        model, rule, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    ),
    "ContinuousSparsification": lambda model, rule: ps.ContinuousSparsification(
        model, rule, steps=5
    ),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_weights_that_are_missed_are_told_of(name):
    rule = ps.Gate(init=0.0) if name == "ContinuousSparsification" else 0.5
    with pytest.warns(UserWarning, match='leaves "flat" dense') as caught:
        CONTROLLERS[name](Flat(), rule)
    # A lambda of this file made the call.
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CONTROLLERS[name](Flat(), {"fc": rule, "flat": None})
