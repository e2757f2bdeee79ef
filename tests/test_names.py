"""Every spelling of a masked tensor in a state dict, in every reader."""

import pytest
import torch
from torch import nn
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
