"""Every spelling of a masked tensor in a state dict, in every reader."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations

import parasparse as ps
from parasparse import names
from parasparse.cli.main import main

VALUES = torch.arange(1.0, 13.0).view(2, 6)
OTHER = VALUES + 20
FULL = torch.tensor([[1.0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0]])
ROW = torch.tensor([[1.0, 0, 1, 0, 0, 1]])  # broadcasts


class One(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(2, 6)))


class Dict(nn.Module):
    """As cplxmodule has its complex weights."""

    def __init__(self, name):
        super().__init__()
        setattr(
            self,
            name,
            nn.ParameterDict({part: nn.Parameter(torch.zeros(2, 6)) for part in ("real", "imag")}),
        )


class Two(nn.Module):
    def __init__(self, name):
        super().__init__()
        for ending in ("_re", "_im"):
            self.register_parameter(name + ending, nn.Parameter(torch.zeros(2, 6)))


# module, tensor, keys of its values, keys of its mask, the mask
SPELLINGS = [
    (One, "weight", ["parametrizations.weight.original"], ["parametrizations.weight.0.mask"], FULL),
    (One, "weight", ["weight_orig"], ["weight_mask"], FULL),
    (One, "kernel", ["kernel_orig"], ["kernel_mask"], FULL),
    (One, "weight", ["weight"], ["mask"], FULL),
    (One, "weight", ["weight"], ["mask"], ROW),
    (One, "weight", ["weight"], ["weight_mask"], FULL),
    (One, "kernel", ["kernel"], ["kernel_mask"], FULL),
    (One, "weight", ["weight_orig"], ["mask"], FULL),
    (One, "kernel", ["kernel"], ["kernel.mask"], FULL),
    (Dict, "weight", ["weight.real", "weight.imag"], ["mask"], FULL),
    (Dict, "weight", ["weight.real", "weight.imag"], ["mask"], ROW),
    (Dict, "weight", ["weight.real", "weight.imag"], ["weight_mask"], FULL),
    (Dict, "weight", ["weight.real", "weight.imag"], ["weight.mask"], FULL),
    (Two, "w", ["w_re", "w_im"], ["w_mask"], FULL),
    (Two, "w", ["w_re", "w_im"], ["w_re_mask", "w_im_mask"], FULL),
]
# A module's load hook sees what lies in the module. Here the mask lies in the layer around it:
# `ps.load_state_dict` moves it.
NOT_READ = {
    ("a masked model's own load_state_dict", i)
    for i, (kind, _, _, masks, _) in enumerate(SPELLINGS)
    if kind is Dict and masks != ["weight.mask"]
}


def load(dense, masked, tensors, masks, name, folder):
    ps.load_state_dict(dense, tensors | masks)
    return ps.squash(dense).state_dict()


def load_own(dense, masked, tensors, masks, name, folder):
    masked.load_state_dict(tensors | masks)
    return ps.squash(masked).state_dict()


def command_line(dense, masked, tensors, masks, name, folder):
    torch.save(tensors | masks, folder / "in.pt")
    assert main(["squash", str(folder / "in.pt"), str(folder / "out.pt")]) == 0
    return torch.load(folder / "out.pt")


def binarize(dense, masked, tensors, masks, name, folder):
    state, bools = ps.binarize_masks(tensors | masks, masks)
    assert all(state[key].dtype == bools[key].dtype == torch.bool for key in masks)
    return {names.dense_name(key): state[key] for key in tensors}


def deploy(dense, masked, tensors, masks, name, folder):
    for parameter, values in zip(masked.parameters(), tensors.values(), strict=True):
        parameter.data.copy_(values)
    ps.deploy_masks(masked, masks)
    return ps.squash(masked).state_dict()


READERS = {
    "ps.load_state_dict": load,
    "a masked model's own load_state_dict": load_own,
    "the command line": command_line,
    "binarize_masks": binarize,
    "deploy_masks": deploy,
}


@pytest.mark.parametrize("prefix", ["", "layer.0."])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", range(len(SPELLINGS)))
def test_every_reader_reads_every_spelling(number, reader, prefix, tmp_path):
    kind, name, keys, mask_keys, mask = SPELLINGS[number]
    models = [kind(name), ps.sparsify(kind(name), {"*": ps.Fixed(None)})]
    if prefix:
        models = [nn.ModuleDict({"layer": nn.Sequential(model)}) for model in models]
    tensors = {prefix + key: value for key, value in zip(keys, (VALUES, OTHER), strict=False)}
    masks = {prefix + key: mask.clone() for key in mask_keys}
    if (reader, number) in NOT_READ:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            READERS[reader](*models, tensors, masks, prefix + name, tmp_path)
        return
    state = READERS[reader](*models, dict(tensors), masks, prefix + name, tmp_path)
    assert state.keys() == {names.dense_name(key) for key in tensors}
    for key, values in tensors.items():
        assert torch.equal(state[names.dense_name(key)], values * mask), key


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_mask_over_another_parametrization_becomes_bool_and_the_values_stay(wrap):
    model = ps.sparsify(wrap(nn.Linear(6, 2)), {"weight": FULL})
    model.parametrizations.weight[-1].mask_(FULL)
    state = model.state_dict()
    state["parametrizations.weight.1.mask"] = FULL
    result, bools = ps.binarize_masks(state, {"weight": FULL})
    assert torch.equal(result["parametrizations.weight.1.mask"], FULL != 0)
    assert torch.equal(bools["weight"], FULL != 0)
    assert all(result[key] is state[key] for key in state if not key.endswith("mask"))
    with pytest.raises(ValueError, match="0 or 1"):
        ps.binarize_masks(state, {"weight": FULL / 2})


def test_two_names_of_one_mask_may_say_the_same_only():
    model = ps.sparsify(Two("w"), {"w": ps.Fixed(None)})
    ps.deploy_masks(model, {"w_re_mask": FULL, "w_im_mask": FULL.bool()})
    assert torch.equal(ps.mask_of(model, "w"), FULL.bool())
    with pytest.raises(ValueError, match="once"):
        ps.deploy_masks(model, {"w_re_mask": FULL, "w_im_mask": 1 - FULL})


BUFFERS = {
    "another_shape": ("attn.weight", "attn.mask", torch.ones(1, 1, 8, 8)),
    "one_entry": ("token.weight", "token.mask", torch.tensor(False)),
    "beside_a_layer": ("token.weight", "token_mask", torch.ones(4, 4, dtype=torch.bool)),
    "integers": ("pos", "pos_mask", torch.tensor([[3, 0, 1, 2]])),
    "infinite": ("attn.weight", "attn.mask", torch.tensor([0, -torch.inf, 0, 0])),
    "spectral_norm": ("c.weight_orig", "c.mask", torch.ones(8, 8)),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_called_like_a_mask_stays_what_it_is(kind, tmp_path):
    key, mask_key, buffer = BUFFERS[kind]
    state = {key: torch.ones(4, 4), mask_key: buffer}
    torch.save(state | {"fc.weight": VALUES, "fc.mask": FULL}, tmp_path / "in.pt")
    assert main(["squash", str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]) == 0
    out = torch.load(tmp_path / "out.pt")
    assert torch.equal(out["fc.weight"], VALUES * FULL)
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())
    result, _ = ps.binarize_masks(state | {"fc.weight": VALUES, "fc.mask": FULL}, {"fc": FULL})
    assert all(result[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize("kind", [Two, Dict])
@pytest.mark.parametrize("masked", [False, True])
def test_components_with_masks_of_their_own_keep_them(kind, masked):
    model = ps.sparsify(kind("w"), {"*": 0.5}, pairs=False) if masked else kind("w")
    keys = [name for name, _ in kind("w").named_parameters()]
    state = dict(zip(keys, (VALUES, OTHER), strict=True))
    state |= {f"{keys[0]}_mask": FULL, f"{keys[1]}_mask": 1 - FULL}
    ps.load_state_dict(model, state)
    folded = ps.squash(model).state_dict()
    assert torch.equal(folded[keys[0]], VALUES * FULL)
    assert torch.equal(folded[keys[1]], OTHER * (1 - FULL))


def net():
    return nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 3)))


class Around(nn.Module):
    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


def inside(wrap):
    def wrapped(model):
        model[1] = wrap(model[1])
        return model

    return wrapped


WRAPPERS = {
    "none": lambda model: model,
    "compile": torch.compile,
    "DDP": DataParallel,
    "DDP of compile": lambda model: DataParallel(torch.compile(model)),
    "compile of DDP": lambda model: torch.compile(DataParallel(model)),
    "DDP twice": lambda model: DataParallel(DataParallel(model)),
    "compile inside": inside(torch.compile),
    "checkpointing": checkpoint_wrapper,
    "checkpointing inside": inside(checkpoint_wrapper),
    "FSDP": lambda model: Around("_fsdp_wrapped_module", model),
}


@pytest.mark.parametrize("to", WRAPPERS)
@pytest.mark.parametrize("of", WRAPPERS)
def test_checkpoints_load_whatever_is_wrapped_around_the_models(of, to):
    for source, target in ((0.5, None), (0.5, 0.0), (None, 0.0), (None, None)):
        one, two = net(), net()
        for model, share in ((one, source), (two, target)):
            if share is not None:
                ps.sparsify(model, {"0": share, "1.0": share})
        want = ps.dense_state_dict(one).values()
        state = WRAPPERS[of](one).state_dict()
        keys = list(state)
        assert not any(ps.load_state_dict(WRAPPERS[to](two), state))
        assert list(state) == keys
        got = ps.dense_state_dict(two).values()
        assert all(map(torch.equal, got, want))
        assert ps.is_sparse(two) is (source is not None or target is not None)


def test_a_submodule_called_module_stays_where_it_is():
    for model in (Around("module", nn.Linear(6, 2)), nn.ModuleDict({"module": net(), "b": net()})):
        masked = ps.sparsify(model, 0.5)
        names_before = [name for name, _ in ps.named_masks(masked)]
        state = masked.state_dict()
        assert not any(ps.load_state_dict(ps.unsparsify(model), state))
        assert [name for name, _ in ps.named_masks(model)] == names_before
        part = {key: value for key, value in state.items() if key.startswith("module.")}
        found = ps.load_state_dict(ps.unsparsify(model), part, strict=False)
        assert not found.unexpected_keys
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ps.load_state_dict(net(), {"other.0.weight": torch.ones(4, 6)})


def test_one_tensor_under_two_spellings_is_refused():
    state = net().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ps.load_state_dict(net(), state | {"_orig_mod.0.weight": torch.ones(4, 6)})


@given(st.lists(st.sampled_from(["a", "b", "module", *names.WRAPPED]), min_size=1, max_size=5))
def test_plain_names_have_no_wrappers_and_stay_as_they_are(parts):
    key = ".".join([*parts, "weight"])
    short = names.plain(key)
    assert short == names.plain(short)
    assert not set(short.split(".")) & set(names.WRAPPED)
    assert names.spelled_like([key], [key]) == {key: key}
    assert names.spelled_like([short], [key]) == {short: key}
    assert names.depth_of([key]) == names.depth_of([short])


NESTED = {
    "as NNI": {"0": {"weight": torch.eye(4, 6), "bias": None}},
    "with a bias": {"0": {"weight": torch.eye(4, 6), "bias": torch.ones(4)}},
    "at two depths": {"1": {"0": {"weight": torch.ones(3, 4)}}, "0.weight": torch.eye(4, 6)},
}


@pytest.mark.parametrize("kind", NESTED)
def test_nested_masks_are_the_same_as_flat_ones(kind):
    nested, flat = NESTED[kind], names.flat(NESTED[kind])
    assert all(isinstance(mask, torch.Tensor) for mask in flat.values())
    one, two = ps.sparsify(net(), nested), ps.sparsify(net(), flat)
    assert {name for name, _ in ps.named_masks(one)} == set(flat)
    for model in (one, two):
        ps.deploy_masks(model, {name: torch.ones_like(mask) for name, mask in flat.items()})
    ps.deploy_masks(one, nested)
    for name, mask in flat.items():
        assert torch.equal(ps.mask_of(one, name), mask.bool())
    state = net().state_dict()
    for got, want in zip(
        ps.binarize_masks(state, nested), ps.binarize_masks(state, flat), strict=True
    ):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in got)
    assert [row.name for row in ps.plan(net(), {"0": {"weight": 0.5}})] == ["0.weight"]


def test_a_nested_mask_that_names_nothing_or_something_twice_is_refused():
    with pytest.raises(ValueError, match="0.wieght"):
        ps.sparsify(net(), {"0": {"wieght": torch.eye(4, 6)}})
    with pytest.raises(ValueError, match="twice"):
        ps.binarize_masks(net().state_dict(), {"0": {"weight": [1.0]}, "0.weight": [1.0]})
    with pytest.raises(ValueError, match="earlier"):
        ps.sparsify(net(), {"0": {"weight": torch.eye(4, 6)}, "0.weight": 0.5})


@pytest.mark.parametrize("of", ["compile", "DDP", "compile of DDP"])
def test_masks_by_the_names_of_a_wrapped_model_fit_the_bare_one(of):
    masks = {"0.weight": torch.eye(4, 6), "1.0.weight": torch.eye(3, 4)}
    raw = [name for name, tensor in WRAPPERS[of](net()).named_parameters() if tensor.ndim > 1]
    renamed = dict(zip(raw, masks.values(), strict=True))
    model = ps.sparsify(net(), {"*": 0.0})
    ps.deploy_masks(model, renamed)
    assert all(torch.equal(ps.mask_of(model, name), mask.bool()) for name, mask in masks.items())
    wrapped = WRAPPERS[of](net())
    state, _ = ps.binarize_masks(wrapped.state_dict(), masks)
    assert all(int((state[name] != 0).sum()) <= min(state[name].shape) for name in raw)
    state, _ = ps.binarize_masks(net().state_dict(), renamed)
    assert int((state["0.weight"] != 0).sum()) <= 4
