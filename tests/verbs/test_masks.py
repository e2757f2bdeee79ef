import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.cases import DictLinear, PairLinear, Shared


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def sparse():
    return ps.sparsify(net(), 0.5)


def state(model):
    return {name: None if m is None else m.clone() for name, m in ps.named_masks(model)}


def same(one, two):
    return one.keys() == two.keys() and all(
        (a is b is None) or torch.equal(a, b)
        for a, b in zip(one.values(), two.values(), strict=True)
    )


def test_named_masks_walks_like_named_modules_each_mask_once():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = Shared()
            self.early = nn.Linear(4, 4)

    model = ps.sparsify(Backwards(), 0.5)
    assert [name for name, _ in ps.named_masks(model)] == ["late.first.weight", "early.weight"]
    assert [name for name, _ in ps.named_masks(model, "net")][1] == "net.early.weight"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.removesuffix(".weight"),
        lambda name: name.removesuffix(".weight") + ".mask",
        lambda name: name + "_mask",
    ],
    ids=["name", "layer", "layer.mask", "layer.weight_mask"],
)
def test_masks_are_deployed_under_every_name(rename):
    one, two = sparse(), sparse()
    masks = {rename(name): mask for name, mask in ps.named_masks(one)}
    assert ps.deploy_masks(two, masks) is two
    assert same(state(one), state(two))
    third = sparse()
    ps.deploy_masks(third, state_dict={f"net.{k}": v for k, v in masks.items()}, prefix="net")
    assert same(state(one), state(third))


def test_none_unsets_and_reset_unsets_all_others():
    model = sparse()
    ps.deploy_masks(model, {"0": None})
    assert ps.mask_of(model, "0.weight") is None
    assert ps.mask_of(model, "2.weight") is not None
    ps.deploy_masks(model, {"0": torch.tensor(1.0)}, reset=True)
    assert ps.mask_of(model, "0.weight").all()
    assert ps.mask_of(model, "2.weight") is None
    one, two = sparse(), sparse()
    ps.deploy_masks(two, state(one), reset=True)
    assert same(state(one), state(two))


@pytest.mark.parametrize(
    ("masks", "options", "error", "message"),
    [
        ({"0.wieght": torch.ones(3, 4)}, {}, ValueError, 'nearest: "0.weight"'),
        ({"1": torch.ones(3, 4)}, {}, ValueError, "sparsify"),
        ({"0.bias": torch.ones(3)}, {}, ValueError, "sparsify"),
        ({"0": torch.ones(3, 4), "2": torch.ones(5)}, {}, RuntimeError, "must match the existing"),
        ({"0": 1, "0.weight": 0}, {}, ValueError, "once"),
        ({"0": torch.tensor(float("nan"))}, {}, ValueError, "NaN"),
        ({"0": 1}, {"prefix": "net"}, ValueError, "net"),
        (None, {}, TypeError, "masks"),
    ],
    ids=["typo", "no_tensor", "not_masked", "shape", "twice", "nan", "prefix", "nothing"],
)
def test_what_cannot_be_deployed_is_refused_and_changes_nothing(masks, options, error, message):
    model = sparse()
    before = state(model)
    with pytest.raises(error, match=message):
        ps.deploy_masks(model, masks, **options)
    assert same(before, state(model))


def test_unknown_keys_pass_when_not_strict():
    model = sparse()
    ps.deploy_masks(model, {"nowhere": 1, "0": 1}, strict=False)
    assert ps.mask_of(model, "0.weight").all()


def test_deploying_on_a_gate_is_refused():
    model = ps.sparsify(nn.Linear(2, 2), ps.Gate())
    with pytest.raises(ValueError, match="binarize"):
        ps.deploy_masks(model, {"weight": 1})


@pytest.mark.parametrize("build", [PairLinear, DictLinear])
def test_one_mask_of_a_pair_is_deployed_on_both_parts(build):
    model = ps.sparsify(nn.Sequential(build()), {"0": ps.Fixed(None)})
    ps.deploy_masks(model, {"0.mask": torch.eye(4, 6)})
    assert torch.equal(ps.mask_of(model, "0.weight"), torch.eye(4, 6).bool())
    parts = [module for module in model.modules() if isinstance(module, ps.Mask)]
    assert len(parts) == 1


def test_mask_of_and_stored_name_what_is_there_when_asked_for_something_else():
    model = ps.sparsify(net(), {"0.weight": 0.5})
    with pytest.raises(ValueError, match='nearest: "0.weight"'):
        ps.mask_of(model, "0.weights")
    with pytest.raises(ValueError, match="masked tensor"):
        ps.mask_of(model, "2.weight")
    assert ps.stored(model, "2.weight") is model[2].weight
    assert ps.stored(PairLinear(), "weight_re").dtype == torch.float32
    with pytest.raises(ValueError, match="stored|tensor"):
        ps.stored(model, "3.weight")


def test_is_sparse():
    model = net()
    assert not ps.is_sparse(model)
    assert ps.is_sparse(ps.sparsify(model, {"0.bias": 0.5}))
    assert not ps.is_sparse(ps.unsparsify(model, "0.bias"))
    nn.utils.parametrizations.weight_norm(model[0])
    assert not ps.is_sparse(model)


def test_the_name_of_a_layer_says_what_is_in_it():
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5)
    with pytest.raises(ValueError, match=r'in it: "0.weight"'):
        ps.mask_of(model, "0")


def test_a_tensor_is_found_by_its_name_without_a_walk_through_the_model(monkeypatch):
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"0": 0.5})
    expected = ps.stored(model, "0.weight"), ps.mask_of(model, "0.weight")
    for name in ("masked_targets", "tensors_of"):
        monkeypatch.setattr(f"parasparse.verbs.masks.{name}", None)
    assert ps.stored(model, "0.weight") is expected[0]
    assert ps.mask_of(model, "0.weight") is expected[1]
    assert ps.stored(model, "1.weight") is model[1].weight
