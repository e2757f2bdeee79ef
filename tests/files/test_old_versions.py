"""Files that earlier versions of the format wrote go on loading."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.packed_sizes import save_version_1
from parasparse.checkpoints.save_packed import load_packed
from parasparse.files.opening import open_checkpoint
from tests.files.test_packing import DTYPES, MASKS, SHAPES, drawn_tensor, same


def state():
    """Return what the files beside this one hold, which were written by those versions."""
    entries = torch.zeros(6, 8)
    entries.view(-1)[[3, 10, 30, 47]] = torch.tensor([1.5, -2.0, 0.25, 3.0])
    rows = torch.zeros(8, 4, dtype=torch.bfloat16)
    rows[[1, 6]] = torch.arange(8).view(2, 4).bfloat16() + 1
    return {
        "entries": entries,
        "rows": rows,
        "dense": torch.arange(1, 5),
        "scalar": torch.tensor(True),
        "zeros": torch.zeros(3, 3, dtype=torch.complex64),
        "tied": entries,
        "steps": 3,
    }


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_an_earlier_version_loads(version, suffix):
    path = Path(__file__).with_name(f"version_{version}{suffix}")
    loaded, want = load_packed(path), state()
    assert list(loaded) == list(want)
    assert loaded.pop("steps") == want.pop("steps")
    assert all(same(loaded[name], tensor) for name, tensor in want.items())
    assert loaded["tied"] is loaded["entries"]
    checkpoint = open_checkpoint(str(path))
    assert same(checkpoint.read("rows"), want["rows"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_version_1_loads(tmp_path, dtype):
    tensors = {f"{s}, {k}": drawn_tensor(dtype, s, k, 0) for s in SHAPES for k in MASKS[::2]}
    save_version_1(tensors, tmp_path / "x.safetensors")
    loaded = load_packed(tmp_path / "x.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("version", [1, 2])
def test_a_flipped_byte_of_an_earlier_version_is_found(tmp_path, version):
    whole = Path(__file__).with_name(f"version_{version}.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    size = 8 + int.from_bytes(whole[:8], "little")
    header = range(whole.index(b"entries"), whole.index(b"crc32"), 5)
    for place in (*header, *range(size, len(whole))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            load_packed(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_flipped_byte_of_version_3_is_found(tmp_path, suffix):
    whole = Path(__file__).with_name(f"version_3{suffix}").read_bytes()
    read = load_file if suffix == ".safetensors" else partial(torch.load, weights_only=True)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(whole)
    parts = [read(path)[name].numpy().tobytes() for name in ("tensors", "header")]
    for part, unused in zip(parts, (0, 5), strict=True):  # zlib leaves bits before its checksum
        start = whole.index(part)
        for place in range(start, start + len(part) - unused, 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(ValueError, match="is damaged"):
                load_packed(path)
