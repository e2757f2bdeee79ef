"""What dynamic sparsity refuses, and what it leaves as it was."""

import math

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.training import build, masks_of, sgd, train


@ps.moves.needs("weights")
def nan_importance(masking, name, weight, mask):
    return math.nan


@ps.moves.needs("weights")
def other_shape(masking, mask, weight, name):
    return mask[1:]


@ps.moves.needs("weights")
def adds(masking, mask, weight, name):
    return torch.ones_like(mask)


@ps.moves.needs("weights")
def drops(masking, name, new_mask, total_regrowth, weight):
    return torch.zeros_like(new_mask)


@ps.moves.needs("weights")
def grows_too_much(masking, name, new_mask, total_regrowth, weight):
    return torch.ones_like(new_mask)


PLAIN = {"growth": "random", "redistribution": "magnitude"}


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"redistribution": nan_importance}, 'a finite number; got nan for "0.weight"'),
        ({"redistribution": lambda *_: math.inf}, "a finite number; got inf"),
        ({"redistribution": lambda *_: "3"}, "a finite number; got '3'"),
        ({"redistribution": lambda *_: [1]}, r"must return a number; got \[1\]"),
        ({"prune": other_shape}, r'shape \(30, 12\) for "0.weight"; got \(29, 12\)'),
        ({"prune": lambda *_: None}, "got NoneType"),
        ({"prune": adds}, 'must not add entries to the mask; it does to "0.weight"'),
        ({"growth": drops}, 'must not drop entries of the mask; it does in "0.weight"'),
        ({"growth": grows_too_much}, r"must add at most \d+ connections"),
        ({"prune_rate": lambda step: 1.5 * (step > 0)}, r"`prune_rate\(2\)` must be in \[0, 1\]"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_a_failed_update_leaves_masks_budget_and_count(keywords, text):
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(model, 0.8, optimizer, every=2, **{**PLAIN, **keywords})
    train(model, optimizer, dst)
    before, state = masks_of(model), dst.state_dict()
    with pytest.raises((ValueError, TypeError), match=text):
        train(model, optimizer, dst)
    after = masks_of(model)
    assert all(after[name].equal(mask) for name, mask in before.items())
    assert dst.steps == state["steps"] == 1
    assert not dst.history


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"growth": "momentum", "redistribution": "none"}, "must keep momentum.*SGD keeps none"),
        ({"redistribution": "momentum"}, "must keep momentum"),
        ({"growth": "fastest"}, "`growth` must be one of .* or a function; got 'fastest'"),
        ({"prune": 3}, "`prune` must be a name or a function; got 3"),
        ({"prune_rate": 1.5}, r"`prune_rate` must be in \[0, 1\]"),
        ({"prune_rate": lambda step: math.nan}, r"`prune_rate\(0\)` must be in"),
        ({"every": 0}, "`n` must be at least 1"),
        ({"init": "ones"}, "`init` must be one of"),
        ({"init": {"0.weight": torch.ones(30, 12)}}, '"2.weight", "3.weight" have none'),
        ({"init": {"nowhere": torch.ones(2)}}, "`init` must have a mask for each"),
        ({"every": 2.0}, "`every` must be a whole number of steps, or a function"),
        ({"every": "2"}, "`every` must be a whole number"),
        ({"prune_rate": "much"}, r"`prune_rate` must be a number in \[0, 1\]; got 'much'"),
        ({"rules": {"*": None}}, "`rules` must give at least one tensor a mask"),
        (
            {"growth": lambda masking, name, mask: None},
            r"must take \(masking, name, new_mask.*got \(m",
        ),
        ({"prune": lambda: None}, r"`prune` must take \(masking, mask, weight, name\) or"),
        (
            {
                "redistribution": "none",
                "growth": lambda *_: None,
                "rules": {"0.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0))},
            },
            "pairs and patterns of units",
        ),
        ({"rules": 1.0}, "must leave each tensor at least one connection"),
        ({"rules": ps.Gate()}, "must give each tensor a bool mask"),
        ({"rules": {"0.weight": torch.rand(30, 12)}}, "must give each tensor a bool mask"),
        ({"rules": {"0.weight": ps.Fixed(None)}}, "must give each tensor a bool mask"),
        (
            {"rules": {"0.weight": ps.Prune(pattern=ps.patterns.nearly_diagonal(3))}},
            "unstructured, of units, or n_of_m",
        ),
        (
            {"rules": {"0.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0))}},
            'use `redistribution="none"`',
        ),
        ({"growth": "gradient"}, "`every` must not be None"),
        ({"rules": {"nowhere": 0.5}}, "must each reach a tensor"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_bad_input_is_refused_and_changes_nothing(keywords, text):
    model = build()
    optimizer = sgd(model, momentum=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=text):
        ps.DynamicSparsity(model, keywords.pop("rules", 0.8), optimizer, **{**PLAIN, **keywords})
    assert not ps.is_sparse(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_growth_within_groups_is_by_a_score():
    model = build()
    rules = {"0.weight": ps.Prune(pattern=ps.patterns.n_of_m(2, 4))}
    for growth in ("momentum_neuron", grows_too_much):
        with pytest.raises(ValueError, match='`growth` must be "random", "momentum" or "gradient"'):
            ps.DynamicSparsity(model, rules, sgd(model), growth=growth, redistribution="none")


def test_weights_that_are_not_trained_or_parametrized_are_refused():
    model = build()
    with pytest.raises(ValueError, match='must hold the parameters.*"2.weight"'):
        ps.DynamicSparsity(model, 0.5, sgd(model[0]))
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.9)
    with pytest.raises(ValueError, match='must hold the parameters.*"2.weight"'):
        ps.DynamicSparsity(model, 0.5, optimizer)
    model = build()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match='cannot mask parametrized tensors, such as "0.weight"'):
        ps.DynamicSparsity(model, 0.5, sgd(model))
    assert not ps.is_sparse(model)


@pytest.mark.parametrize("growth", ["momentum", "gradient"])
def test_an_update_before_the_first_backward_is_refused(growth):
    model = build()
    dst = ps.DynamicSparsity(model, 0.8, sgd(model), growth=growth, redistribution="none", every=1)
    before = masks_of(model)
    with pytest.raises(RuntimeError, match="have had no gradient yet"):
        dst.step()
    assert dst.steps == 0
    assert all(mask.equal(before[name]) for name, mask in masks_of(model).items())


def test_an_update_by_hand_has_no_dense_gradient():
    model = build()
    optimizer = sgd(model)
    dst = ps.rigl(model, 0.8, optimizer, stop=100, every=10)
    train(model, optimizer, dst)
    with pytest.raises(RuntimeError, match="`update` cannot be called"):
        dst.update()


def test_a_step_after_squash_says_what_happened():
    model = build()
    optimizer = sgd(model)
    dst = ps.DynamicSparsity(model, 0.8, optimizer)
    ps.squash(model)
    with pytest.raises(RuntimeError, match="must stay on its model"):
        dst.step()


def test_a_state_of_other_tensors_is_refused():
    one, two = build(), nn.Linear(5, 5)
    state = ps.DynamicSparsity(one, 0.5, sgd(one)).state_dict()
    other = ps.DynamicSparsity(two, 0.5, sgd(two))
    with pytest.raises(ValueError, match="must be from a controller with the same rules"):
        other.load_state_dict(state)


def test_resuming_from_a_real_mask_is_refused():
    model = ps.sparsify(build(), {"0.weight": torch.rand(30, 12)})
    with pytest.raises(ValueError, match="needs bool masks.*`binarize` the model first"):
        ps.DynamicSparsity(model, {"0.weight": 0.5}, sgd(model), init="resume")


def test_another_controller_takes_over_from_one_that_collects():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = ps.rigl(model, 0.5, optimizer, stop=9, every=1)
    with pytest.raises(RuntimeError, match="about to update"):
        ps.rigl(model, 0.5, optimizer, stop=9, every=1)
    first.close()
    second = ps.rigl(model, 0.5, optimizer, stop=9, every=1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    second.step()
    assert len(second.history) == 1


@pytest.mark.parametrize("make", [ps.rigl, ps.sparse_momentum])
def test_a_step_without_its_masks_is_refused(make):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    controller = make(model, 0.5, optimizer, stop=9, every=1)
    ps.squash(model)
    with pytest.raises(RuntimeError, match="removed, unset or replaced"):
        controller.step()
    assert not ps.is_sparse(model)
