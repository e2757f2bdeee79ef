"""Full sizes again: the same outputs, the masks of before, and the way back."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import assert_same, built, filters, pruned

NAMES = ("flatten", "residual", "gated", "attention", "grouped", "joined", "tied", "lstm")


def shapes(model):
    return {name: t.shape for name, t in ps.dense_state_dict(model).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_full_network_computes_what_the_small_one_did(name):
    model, example, others = built(name)
    pruned(model, example)
    before, plan = shapes(model), ps.plan_shrink(model, example)
    ps.shrink(model, example)
    small = copy.deepcopy(model)
    assert ps.unshrink(model, plan) is model
    assert shapes(model) == before
    assert_same(model, small, example, others)
    again = ps.plan_shrink(model, example)
    assert [(r.name, r.kept) for r in again.rows] == [(r.name, r.kept) for r in plan.rows]
    assert set(again.attributes) == set(plan.attributes)
    ps.shrink(model, example)
    for one, other in zip(model.state_dict().values(), small.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_parameters_stay_and_removed_channels_are_masked():
    model, example, _ = built("flatten")
    ps.sparsify(model, {"4": filters(0.5)})
    mask = ps.mask_of(model, "4.weight").clone()
    weight = ps.stored(model, "4.weight")
    plan = ps.plan_shrink(model, example)
    ps.shrink(model, example)
    parameters = list(map(id, model.parameters()))
    ps.unshrink(model, plan)
    assert set(parameters) == set(map(id, model.parameters()))
    assert torch.equal(ps.mask_of(model, "4.weight"), mask)
    assert torch.equal(ps.stored(model, "4.weight"), weight * mask)
    assert model[4].out_channels == 6
    assert model[6].in_features == 24


def test_masks_of_the_small_network_become_larger():
    model, example, _ = built("flatten")
    ps.sparsify(model, {"6": 0.5, "4": filters(0.5)})
    old, plan = ps.mask_of(model, "6.weight").clone(), ps.plan_shrink(model, example)
    ps.shrink(model, example)
    small = copy.deepcopy(model)
    ps.unshrink(model, plan)
    kept = torch.zeros(24, dtype=torch.bool)
    kept[list({r.name: r for r in plan.rows}["6.weight"].kept[1])] = True
    assert torch.equal(ps.mask_of(model, "6.weight"), old & kept)
    assert_same(model, small, example)


def test_values_come_back_from_the_dense_checkpoint():
    model, example, _ = built("flatten")
    with torch.no_grad():
        model[4].bias.zero_()  # so that nothing is added to the next bias
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    ps.sparsify(model, {"4": filters(0.5)})
    plan = ps.plan_shrink(model, example)
    ps.shrink(model, example)
    ps.unshrink(model, plan, dense)
    assert not ps.is_sparse(model)
    assert all(torch.equal(t, dense[name]) for name, t in model.state_dict().items())


def test_optimizer_state_and_gradients_grow_by_zeros():
    model, example, _ = built("flatten")
    pruned(model, example)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(example).square().sum().backward()
    optimizer.step()
    plan = ps.plan_shrink(model, example)
    grads = {p: p.grad.clone() for p in model.parameters()}
    states = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    ps.shrink(model, example, optimizer=optimizer)
    ps.unshrink(model, plan, optimizer=optimizer)
    masks = dict(ps.named_masks(model))
    assert masks
    for name, mask in masks.items():
        module, attr = name.rsplit(".", 1)
        (p,) = [p for n, p in model.named_parameters() if n.startswith(f"{module}.param")
                and f".{attr}." in n and p.is_floating_point()]  # fmt: skip
        assert torch.equal(p.grad, grads[p] * mask)
        assert torch.equal(optimizer.state[p]["exp_avg"], states[p] * mask)


def test_what_does_not_fit_is_refused_before_anything_changes():
    model, example, _ = built("flatten")
    ps.sparsify(model, {"4": filters(0.5)})
    plan = ps.plan_shrink(model, example)
    with pytest.raises(ValueError, match=r"must have the shape .* Pass the model that was cut"):
        ps.unshrink(model, plan)  # full already
    ps.shrink(model, example)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'has no "4.weight"'):
        ps.unshrink(model, plan, {"0.weight": torch.zeros(8, 3, 3, 3)})
    with pytest.raises(ValueError, match="before `shrink`"):
        ps.unshrink(model, plan, before)
    with pytest.raises(TypeError, match=r"`plan` must be a Shrinkage; got .*from_json"):
        ps.unshrink(model, plan.to_json())
    with pytest.raises(TypeError, match=r"`state_dict` must be a dict of tensors; got 'dense.pt'"):
        ps.unshrink(model, plan, "dense.pt")
    with pytest.raises(TypeError, match=r'"4.weight" of `state_dict` must be a tensor; got 1'):
        ps.unshrink(model, plan, dict.fromkeys(before, 1))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert isinstance(model[4], nn.Conv2d)
