"""Packed files: what comes back is what went in."""

import json
import sys
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torchvision import models

import parasparse as ps
from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.files.codes import digits, places
from parasparse.files.opening import open_checkpoint
from tests.files.test_codes import weights
from tests.files.test_packing import DTYPES, MASKS, SHAPES, drawn_tensor, same
from tests.helpers.cases import Tied
from tests.helpers.machine import needs_mkl

SUFFIXES = [".safetensors", ".pt"]
both = pytest.mark.parametrize("suffix", SUFFIXES)


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"model{request.param}"


def same_states(one, two):
    return list(one) == list(two) and all(same(one[name], two[name]) for name in one)


def small():
    sparse = torch.where(torch.arange(64).view(8, 8) % 5 == 0, torch.randn(8, 8), 0.0)
    return {"a.weight": sparse, "a.bias": torch.ones(3, dtype=torch.bfloat16)}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES),
            st.sampled_from(SHAPES),
            st.sampled_from(MASKS),
            st.integers(0, 2**31),
        ),
        max_size=5,
    ),
    st.sampled_from(SUFFIXES),
)
def test_any_state_comes_back_bit_for_bit(tmp_path_factory, drawn, suffix):
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    state = {f"päth.{i}": drawn_tensor(*draw) for i, draw in enumerate(drawn)}
    save(state, path)
    assert same_states(load_packed(path), state)


def test_every_dtype_comes_back(path):
    state = {
        f"{dtype}, {shape}, {kind}": drawn_tensor(dtype, shape, kind, 1)
        for dtype in DTYPES
        for shape in SHAPES
        for kind in MASKS
    }
    save(state, path)
    assert same_states(load_packed(path), state)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.11), (torch.bfloat16, 0.11)])
def test_a_file_at_90_percent_keeps_to_its_size(path, dtype, most):
    layer = ps.sparsify(nn.Linear(512, 512, bias=False).to(dtype), 0.9)
    save(layer, path)
    dense = path.with_name("dense")
    torch.save(ps.dense_state_dict(layer), dense)
    assert path.stat().st_size <= most * dense.stat().st_size


def test_resnet18_goes_into_a_dense_and_a_masked_model(path):
    source = ps.sparsify(models.resnet18(weights=None), 0.9).eval()
    save(source, path)
    state = load_packed(path)
    assert same_states(state, ps.dense_state_dict(source))
    x = torch.randn(1, 3, 64, 64)
    dense = models.resnet18(weights=None).eval()
    masked = ps.sparsify(models.resnet18(weights=None), 0.0).eval()
    for model in (dense, masked):
        assert not any(model.load_state_dict(state))
        assert torch.equal(model(x), source(x))


def test_a_model_that_was_squashed_or_never_masked_is_saved_as_it_is(path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    save(model, path)
    assert same_states(load_packed(path), model.state_dict())


def test_tied_tensors_are_stored_once_and_come_back_tied(path):
    model = ps.sparsify(Tied(), {"head.weight": 0.5})
    save(model, path)
    state = load_packed(path)
    assert state["head.weight"] is state["embedding.weight"]
    twin = Tied()
    twin.load_state_dict(state)
    index = torch.arange(5)
    assert torch.equal(twin(index), model(index))


def test_plain_values_come_back_in_their_places(path):
    state = {"x": torch.eye(2), "_extra_state": {"steps": [1, 2.5, None]}, "y": torch.eye(2)}
    save(state, path)
    loaded = load_packed(path)
    assert list(loaded) == list(state)
    assert loaded["_extra_state"] == state["_extra_state"]


@pytest.mark.parametrize("value", [object(), (1, 2), {1: 2}, {"x": torch.eye(2)}, float("nan")])
def test_values_that_json_would_change_are_refused_before_anything_is_written(path, value):
    with pytest.raises(TypeError, match="tensors and plain JSON by name; got .* as 'extra'"):
        save({"x": torch.eye(2), "extra": value}, path)
    with pytest.raises(TypeError, match="got Tensor as 1"):
        save({1: torch.eye(2)}, path)
    with pytest.raises(ValueError, match='"x" is on the meta device'):
        save({"x": torch.eye(2, device="meta")}, path)
    assert not list(path.parent.iterdir())


def test_loaded_tensors_are_writable_and_free_of_the_file(path):
    state = {"dense": torch.arange(4.0) + 1, "sparse": torch.eye(16)}
    save(state, path)
    loaded = load_packed(path)
    before = path.read_bytes()
    for tensor in loaded.values():
        tensor.add_(1.0)
    save({"other": torch.ones(100)}, path)
    assert torch.equal(loaded["sparse"], torch.eye(16) + 1)
    save(state, path)
    assert path.read_bytes() == before  # and a state has but one file


def test_the_default_device_does_not_matter(path):
    """Models are made on the meta device, and take what is loaded by assignment."""
    state = {str(seed): weights("0.9", (256, 512), torch.float32, seed) for seed in range(3)}
    state |= {pattern: weights(pattern, (64, 64), torch.float32) for pattern in ("0.5", "2:4")}
    for table in (places._ones_of_bytes, digits._fields, digits._threes):
        table.cache_clear()  # so that they are made here
    with torch.device("meta"):
        save(state, path)
        loaded, checkpoint = load_packed(path), open_checkpoint(str(path))
        assert torch.empty(0).is_meta
        assert same_states(loaded, state)
        assert all(same(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_a_safetensors_file_is_one_for_everybody(tmp_path):
    state = {**small(), "empty": torch.zeros(0), "steps": 3}
    save(state, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["header", "tensors"]
        assert file.metadata() == {"format": "parasparse-packed", "version": "4"}
        header = json.loads(zlib.decompress(file.get_tensor("header").numpy()))
        nbytes = len(file.get_tensor("tensors"))
    assert header["entries"]["a.weight"]["dtype"] == "float32"
    assert header["entries"]["a.weight"]["shape"] == [8, 8]
    assert nbytes == sum(header["streams"])


def test_a_missing_file_and_a_folder_are_the_systems_errors(path):
    with pytest.raises(FileNotFoundError):
        load_packed(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        load_packed(path)
    with pytest.raises(ValueError, match="exists and is not a regular file"):
        save(small(), path)
    with pytest.raises(FileNotFoundError):
        save(small(), path / "no" / "such.pt")


def test_without_safetensors_reading_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors", None)
    save(small(), path)
    with pytest.raises(ImportError, match=r'pip install "parasparse\[safetensors\]"'):
        load_packed(path)


class Versioned(nn.Module):
    """Rescales what modules of its first version have saved."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *more):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 10
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


def test_versions_of_modules_come_back(path):
    model = nn.Sequential(Versioned())
    save(model, path)
    for state in (load_packed(path), ps.unpack(ps.pack(model.state_dict()))):
        assert state._metadata == model.state_dict()._metadata
        model.load_state_dict(state)
        assert torch.equal(model[0].weight, torch.ones(3))


@needs_mkl
def test_weights_without_dense_values_are_no_ties(path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    ps.squash(ps.sparsify(model, 0.9))
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    ps.accelerate(model, formats={f"{i}.weight": [[1, "csr"]] for i in (0, 1)}, keep_dense=False)
    for state in (model, dict(model.named_parameters()), model.state_dict(keep_vars=True)):
        save(state, path)
        assert same_states(load_packed(path), want)


class Subclass(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_subclasses_are_stored_as_plain_tensors_or_refused(path):
    save({"x": torch.eye(3).as_subclass(Subclass), "y": nn.Parameter(torch.eye(4))}, path)
    loaded = load_packed(path)
    assert {type(tensor) for tensor in loaded.values()} == {torch.Tensor}
    assert same_states(loaded, {"x": torch.eye(3), "y": torch.eye(4)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match='"x" is a Wrapper, which has no storage of its own'):
        save({"x": Wrapper(torch.eye(2))}, path)
    with pytest.raises(ValueError, match='"weight" is not initialized yet'):
        save(nn.LazyLinear(3), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.int4, torch.uint2])
def test_dtypes_without_kernels_come_back(path, dtype):
    tensor = torch.arange(8, dtype=torch.int8).add(1).view(dtype)
    save({"x": tensor}, path)
    loaded = load_packed(path)["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.view(torch.int8), tensor.view(torch.int8))


def test_names_that_a_file_cannot_hold_are_refused(path):
    class Name(str):
        __slots__ = ()

    save({Name("x"): torch.eye(2)}, path)
    assert list(map(type, load_packed(path))) == [str]
    for name in ("__metadata__", "\ud800"):
        with pytest.raises(TypeError, match="by name; got Tensor as"):
            save({name: torch.eye(2)}, path)
    for state in (torch.eye(2), [torch.eye(2)]):
        with pytest.raises(TypeError, match=r"such as `model\.state_dict\(\)`; got"):
            save(state, path)
