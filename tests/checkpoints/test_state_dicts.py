import copy
import io
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils import prune

import parasparse as ps
from tests.helpers.cases import DictLinear, PairLinear, Tied


def net():
    return nn.Sequential(OrderedDict(first=nn.Linear(4, 3), act=nn.ReLU(), last=nn.Linear(3, 2)))


def sparse():
    return ps.sparsify(net(), 0.5)


x = torch.linspace(-1, 1, 8).view(2, 4)


def test_a_dense_checkpoint_loads_strictly_and_masks_stay():
    model, dense = sparse(), net()
    masks = {n: m.clone() for n, m in ps.named_masks(model)}
    assert not any(model.load_state_dict(dense.state_dict()))
    assert torch.equal(ps.stored(model, "first.weight"), dense.first.weight)
    assert all(torch.equal(m, masks[n]) for n, m in ps.named_masks(model))


def test_strictness_still_finds_what_is_missing_or_too_much():
    model = sparse()
    state = net().state_dict()
    del state["first.weight"]
    with pytest.raises(RuntimeError, match="first.parametrizations.weight.original"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="first.parametrizations.weight.0.extra"):
        model.load_state_dict({**model.state_dict(), "first.parametrizations.weight.0.extra": x})


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (3, 4)], ids=str)
def test_masks_of_any_broadcastable_shape_load(shape):
    model, mask = sparse(), torch.rand(shape) < 0.5
    state = {**model.state_dict(), "first.parametrizations.weight.0.mask": mask}
    model.load_state_dict(state)
    assert torch.equal(ps.mask_of(model, "first.weight"), mask.expand(3, 4))


def test_a_mask_of_another_shape_is_an_error_of_the_load():
    model = sparse()
    state = {**model.state_dict(), "first.parametrizations.weight.0.mask": torch.ones(5)}
    with pytest.raises(RuntimeError, match="must match the existing size"):
        model.load_state_dict(state)


def test_masks_of_the_other_kind_replace_the_buffer():
    real, model = sparse(), sparse()
    ps.deploy_masks(real, {"first": torch.tensor(0.5)})
    model.load_state_dict(real.state_dict())
    assert ps.mask_of(model, "first.weight").unique().tolist() == [0.5]
    model.load_state_dict(sparse().state_dict())
    assert ps.mask_of(model, "first.weight").dtype == torch.bool


def test_none_unsets_and_a_missing_mask_keeps_the_present_one():
    model = sparse()
    mask = ps.mask_of(model, "last.weight").clone()
    state = model.state_dict()
    state["first.parametrizations.weight.0.mask"] = None
    del state["last.parametrizations.weight.0.mask"]
    model.load_state_dict(state)
    assert ps.mask_of(model, "first.weight") is None
    assert torch.equal(ps.mask_of(model, "last.weight"), mask)
    unset = ps.sparsify(net(), {"*": ps.Fixed(None)})
    unset.load_state_dict(unset.state_dict())
    unset.load_state_dict(sparse().state_dict())
    assert unset(x).shape == (2, 2)


@pytest.mark.parametrize("load", ["ours", "torch"])
def test_checkpoints_of_torch_prune_load(load):
    source = net()
    prune.l1_unstructured(source.first, "weight", amount=0.5)
    if load == "ours":
        model = net()
        ps.load_state_dict(model, source.state_dict())
    else:
        model = ps.sparsify(net(), {"first": 0.0})
        model.load_state_dict(source.state_dict())
    assert torch.equal(model(x), source(x))
    assert torch.equal(ps.mask_of(model, "first.weight"), source.first.weight_mask.bool())
    assert torch.equal(ps.stored(model, "first.weight"), source.first.weight_orig)
    assert [name for name, _ in ps.named_masks(model)] == ["first.weight"]


@pytest.mark.parametrize("load", ["ours", "torch"])
@pytest.mark.parametrize(
    "mask", [torch.eye(3, 4), torch.ones(1, 4), None], ids=["full", "row", "none"]
)
def test_checkpoints_of_cplxmodules_real_layers_load(load, mask):
    state = {**net().state_dict(), "first.mask": mask}
    model = net() if load == "ours" else ps.sparsify(net(), {"first": 0.5})
    (ps.load_state_dict if load == "ours" else nn.Module.load_state_dict)(model, state)
    if mask is None:
        assert ps.mask_of(model, "first.weight") is None
    else:
        assert torch.equal(model.first.weight, state["first.weight"] * mask)


def test_checkpoints_of_cplxmodules_complex_layers_load():
    source = nn.Sequential(DictLinear())
    mask = torch.rand(1, 6) < 0.5
    state = {**source.state_dict(), "0.mask": mask.float()}
    assert set(state) == {"0.weight.real", "0.weight.imag", "0.mask"}
    model = nn.Sequential(DictLinear())
    assert not any(ps.load_state_dict(model, state))
    for part in ("real", "imag"):
        assert torch.equal(model[0].weight[part], source[0].weight[part] * mask)
    assert [name for name, _ in ps.named_masks(model)] == ["0.weight"]
    ps.load_state_dict(model, {**state, "0.mask": None})
    assert ps.mask_of(model, "0.weight") is None


def test_a_failed_load_takes_off_what_it_attached():
    model = net()
    state = {**sparse().state_dict(), "nowhere": x}
    with pytest.raises(RuntimeError, match="nowhere"):
        ps.load_state_dict(model, state)
    assert not ps.is_sparse(model)
    assert type(model.first) is nn.Linear
    found = ps.load_state_dict(model, state, strict=False)
    assert found.unexpected_keys == ["nowhere"]
    assert ps.is_sparse(model)


def test_modules_that_read_their_old_weights_themselves_still_do():
    class Migrating(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].T
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = ps.sparsify(Migrating(4, 3), 0.5)
    model.load_state_dict({"weight": torch.ones(4, 3), "bias": torch.zeros(3)})
    assert ps.stored(model, "weight").shape == (3, 4)


def test_a_dense_checkpoint_goes_through_what_lies_underneath():
    model = ps.sparsify(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), 0.5)
    dense = nn.Linear(4, 3)
    model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(ps.stored(model, "weight"), dense.weight)


def test_a_dense_checkpoint_leaves_gates_as_they_are():
    model = ps.sparsify(nn.Linear(4, 3), ps.Gate(init=0.3))
    logits = model.parametrizations.weight[0].logits
    model.load_state_dict(nn.Linear(4, 3).state_dict())
    assert (logits == 0.3).all()


def test_safetensors_round_trips(tmp_path):
    model = sparse()
    save_file(model.state_dict(), tmp_path / "sparse.safetensors")
    save_file(ps.dense_state_dict(model), tmp_path / "dense.safetensors")
    fresh = net()
    ps.load_state_dict(fresh, load_file(tmp_path / "sparse.safetensors"))
    assert torch.equal(fresh(x), model(x))
    plain = net()
    plain.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.equal(plain(x), model(x))


def test_safetensors_round_trips_tied_tensors(tmp_path):
    model = ps.sparsify(Tied(), {"head.weight": 0.5})
    save_model(model, str(tmp_path / "tied.safetensors"))
    twin = ps.sparsify(Tied(), {"head.weight": 0.9})
    load_model(twin, str(tmp_path / "tied.safetensors"))
    index = torch.arange(5)
    assert torch.equal(twin(index), model(index))
    assert torch.equal(ps.mask_of(twin, "head.weight"), ps.mask_of(model, "head.weight"))


def test_tied_tensors_are_tied_in_the_dense_state():
    state = ps.dense_state_dict(ps.sparsify(Tied(), {"head.weight": 0.5}))
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    twin = Tied()
    twin.load_state_dict(state)


def test_weights_only_loading_of_a_sparse_checkpoint():
    model, file = sparse(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = sparse()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_model_on_the_meta_device_takes_a_checkpoint_by_assignment(kind):
    source = sparse()
    with torch.device("meta"):
        model = net()
    ps.sparsify(model, 0.5)
    assert all(mask.is_meta for _, mask in ps.named_masks(model))
    if kind == "sparse":
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        ps.squash(model)
        ps.load_state_dict(model, source.state_dict(), assign=True)
    assert torch.equal(model(x), source(x))
    assert not any(mask.is_meta for _, mask in ps.named_masks(model))
    model(x).sum().backward()


def test_a_dense_checkpoint_assigned_to_a_meta_model_leaves_its_masks_unset():
    with torch.device("meta"):
        model = ps.sparsify(net(), 0.5)
    dense = net()
    model.load_state_dict(dense.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="has no sparsity mask"):
        model(x)
    ps.sparsify(model, 0.5)
    assert int((model.first.weight != 0).sum()) == 6


def test_a_meta_model_can_be_emptied_onto_a_device_and_loaded():
    source = sparse()
    with torch.device("meta"):
        model = ps.sparsify(net(), 0.5)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(x), source(x))


def test_a_mask_without_values_is_unset_and_not_read():
    with torch.device("meta"):
        model = ps.sparsify(net(), 0.5)
    model.to_empty(device="cpu")
    ps.load_state_dict(model, net().state_dict())
    with pytest.raises(RuntimeError, match="has no sparsity mask"):
        model(x)


def test_a_module_that_reads_its_weight_after_loading_reads_the_new_values():
    class Scaled(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            self.scale = float(self.weight.detach().abs().max())

    model = ps.sparsify(Scaled(8, 8), 0.5)
    with torch.no_grad():
        model.parametrizations.weight.original.mul_(10)
    other = Scaled(8, 8)
    ps.load_state_dict(other, model.state_dict())
    assert other.scale == float(model.weight.detach().abs().max())
    again = ps.sparsify(Scaled(8, 8), 0.5)
    again.load_state_dict(model.state_dict())
    assert again.scale == other.scale


def test_binarize_masks_multiplies_leaves_no_minus_zero_and_returns_new_dicts():
    weight = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    state, masks = {"a.weight": weight, "a.bias": torch.ones(2)}, {"a": [[0.0, 0.5], [-1.0, 0.0]]}
    new, binary = ps.binarize_masks(state, masks)
    assert new["a.weight"].tolist() == [[0.0, 1.0], [-3.0, 0.0]]
    assert not torch.signbit(new["a.weight"][new["a.weight"] == 0]).any()
    assert binary["a"].tolist() == [[False, True], [True, False]]
    assert weight.tolist() == [[-1.0, 2.0], [3.0, -4.0]]
    assert new["a.bias"] is state["a.bias"]


@pytest.mark.parametrize("key", ["0", "0.mask", "0.weight", "0.weight_mask"])
@pytest.mark.parametrize("build", [DictLinear, PairLinear, lambda: nn.Linear(6, 4)])
def test_binarize_masks_takes_every_name_and_pairs(key, build):
    model = nn.Sequential(build())
    mask = torch.rand(1, 6)
    new, binary = ps.binarize_masks(model.state_dict(), {key: mask})
    for name, tensor in model.state_dict().items():
        wanted = tensor * mask if "weight" in name else tensor
        torch.testing.assert_close(new[name], wanted)
    assert torch.equal(binary[key], mask != 0)
    sparse_model = ps.sparsify(nn.Sequential(build()), {"*": ps.Fixed(None)})
    ps.deploy_masks(sparse_model, binary)


def test_binarize_masks_of_a_masked_models_own_state():
    model = ps.sparsify(nn.Linear(4, 3), {"weight": torch.rand(3, 4)})
    expected = model(x)
    new, _ = ps.binarize_masks(model.state_dict(), dict(ps.named_masks(model)))
    model.load_state_dict(new)
    torch.testing.assert_close(model(x), expected)
    assert ps.mask_of(model, "weight").dtype == torch.bool


def test_binarize_masks_refuses_unknown_keys():
    with pytest.raises(ValueError, match='"b.mask" do not'):
        ps.binarize_masks({"a.weight": torch.ones(2)}, {"a": 1, "b.mask": 1})


def test_the_dense_state_of_a_model_without_masks_is_its_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    one, two = ps.dense_state_dict(model), model.state_dict()
    assert list(one) == list(two)
    assert one._metadata == two._metadata


def test_the_dense_state_changes_nothing_and_is_detached():
    model = sparse()
    before = copy.deepcopy(model.state_dict())
    state = ps.dense_state_dict(model)
    assert not any(tensor.requires_grad for tensor in state.values())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("build", [PairLinear, DictLinear])
def test_a_pair_saved_with_masks_apart_is_loaded_with_masks_apart(build):
    source = ps.sparsify(build(), {"*": 0.5}, pairs=False)
    model = build()
    ps.load_state_dict(model, source.state_dict())
    assert len(list(ps.named_masks(model))) == 2
    y = torch.randn(2, 6)
    assert torch.equal(model(y), source(y))
    with pytest.raises(RuntimeError):
        ps.load_state_dict(other := build(), {**source.state_dict(), "nowhere": y})
    assert not ps.is_sparse(other)


@pytest.mark.parametrize("build", [PairLinear, DictLinear, Tied])
def test_binarize_masks_of_the_own_state_of_pairs_and_ties(build):
    rule = "head.weight" if build is Tied else "weight"
    model = ps.sparsify(build(), {rule: ps.Fixed(0.5)})
    y = torch.arange(5) if build is Tied else torch.randn(2, 6)
    expected = model(y)
    new, _ = ps.binarize_masks(model.state_dict(), dict(ps.named_masks(model)))
    model.load_state_dict(new)
    torch.testing.assert_close(model(y), expected)
    assert all(mask.dtype == torch.bool for _, mask in ps.named_masks(model))


def test_binarize_masks_keeps_a_view_of_another_dtype():
    weight = torch.tensor([-1.0, 2.0])
    state = {"weight": weight, "bits": weight.view(torch.int32), "tied": weight.view(2)}
    new, _ = ps.binarize_masks(state, {"weight": [False, True]})
    assert new["bits"] is state["bits"]
    assert new["tied"].tolist() == new["weight"].tolist() == [0.0, 2.0]


def test_binarize_masks_refuses_two_masks_for_one_weight():
    with pytest.raises(ValueError, match="once"):
        ps.binarize_masks({"weight": torch.ones(2)}, {"weight": 0.5, "weight_mask": 0.5})


def test_the_dense_state_keeps_the_order_beside_a_layer_of_torch_prune():
    model = net()
    prune.l1_unstructured(model.first, "weight", amount=0.5)
    ps.sparsify(model, {"last": 0.5})
    folded = ps.dense_state_dict(model)
    assert list(folded) == list(ps.squash(model).state_dict())


def test_a_parameter_of_its_own_called_like_a_mask_stays_one():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight_mask = nn.Parameter(torch.randn(3, 4))

    model = ps.sparsify(Own(), {"weight*": 0.5})
    dense = Own().state_dict()
    model.load_state_dict(dense)
    assert torch.equal(ps.stored(model, "weight_mask"), dense["weight_mask"])


def test_a_packed_file_that_torch_read_is_no_state_dict(tmp_path):
    ps.save(nn.Linear(4, 4), tmp_path / "packed.pt")
    with pytest.raises(ValueError, match="load_packed"):
        ps.load_state_dict(nn.Linear(4, 4), torch.load(tmp_path / "packed.pt"))
