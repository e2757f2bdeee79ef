"""Another reader, written from docs/packed-format.md, reads what `save` writes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from parasparse.checkpoints.save_packed import save
from parasparse.files.codes import tensors
from tests.files.numpy_reader import read_safetensors
from tests.files.test_codes import PATTERNS, drawn, weights
from tests.files.test_packing import DTYPES, MASKS, SHAPES, drawn_tensor


def words(tensor):
    """Return the bytes of `tensor` as the other reader gives them: those of each word in a row."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def assert_read(path, state):
    found = read_safetensors(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert math.prod(found[name].shape) == tensor.numel() * (2 if tensor.is_complex() else 1)
        assert np.array_equal(
            np.ascontiguousarray(found[name]).reshape(-1).view("u1"), words(tensor)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read(tmp_path, dtype):
    state = {
        f"{shape}, {kind}": drawn_tensor(dtype, shape, kind, 0)
        for shape in SHAPES[::3]
        for kind in MASKS
    }
    save(state, tmp_path / "x.safetensors")
    assert_read(tmp_path / "x.safetensors", state)


@given(drawn())
def test_tensors_of_every_pattern_are_read(tmp_path_factory, tensor):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    save({"x": tensor}, path)
    assert_read(path, {"x": tensor})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_many_pieces_are_read(tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(tensors, "_WORDS_OF_PIECE", 500)
    state = {str(d): weights(pattern, (96, 64), d) for d in (torch.bfloat16, torch.float32)}
    save({**state, "tied": state["torch.float32"]}, tmp_path / "x.safetensors")
    assert_read(tmp_path / "x.safetensors", {**state, "tied": state["torch.float32"]})
