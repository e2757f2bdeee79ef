"""A file that is damaged, cut, newer or of another kind is an error, never another tensor."""

import os
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.files import headers
from parasparse.files.codes.tensors import encode
from parasparse.files.opening import open_checkpoint
from tests.files.test_files import both, same_states, small


def damaged(path, state):
    """Load; return whether that was refused. If it was not, the tensors must be the same."""
    try:
        loaded = load_packed(path)
    except ValueError:
        return True
    assert same_states(loaded, state)
    return False


@both
def test_no_flipped_byte_gives_another_tensor(tmp_path, suffix):
    path, state = tmp_path / f"x{suffix}", small()
    save(state, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole)):
        for flip in (0xFF, 1 << place % 8):
            changed = bytearray(whole)
            changed[place] ^= flip
            path.write_bytes(changed)
            refused += damaged(path, state)
    # In a zip file much is padding, or said twice and read once.
    assert refused >= (2 * len(whole) - 16 if suffix == ".safetensors" else len(whole) // 2)


@both
def test_each_flipped_bit_of_the_tensors_and_the_header_is_found(tmp_path, suffix):
    path, state = tmp_path / f"x{suffix}", small()
    save(state, path)
    whole = path.read_bytes()
    coded, header = encode(state["a.weight"]).numpy().tobytes(), compressed_header(path)
    for needle, unused in ((coded, 0), (header, 7)):  # zlib leaves up to 7 bits before its checksum
        start, passed = whole.index(needle), 0
        for place in range(start, start + len(needle)):
            for bit in range(8):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                path.write_bytes(changed)
                passed += not damaged(path, state)
        assert passed <= unused


def compressed_header(path):
    read = load_file if path.suffix == ".safetensors" else torch.load
    return read(path)["header"].numpy().tobytes()


@both
def test_every_truncation_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save(small(), path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="`path` must be"):
            load_packed(path)


@both
def test_a_future_version_is_named(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"x{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr(headers, "VERSION", 5)
        save(small(), path)
    with pytest.raises(
        ValueError, match="newer parasparse: version 5; this one reads 1 to 4. Upgrade"
    ):
        load_packed(path)


def test_ordinary_files_are_refused_with_the_right_reader(tmp_path):
    torch.save(small(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt.*another kind of file. Read it with torch.load"):
        load_packed(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="Read it with torch.load"):
        load_packed(tmp_path / "x.pt")
    save_file(small(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="another kind of file. Read it with safetensors"):
        load_packed(tmp_path / "x.safetensors")


def test_neither_kind_is_taken_for_the_other(tmp_path):
    save(small(), tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "y.safetensors")
    save(small(), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "y.pt")
    for name in ("y.safetensors", "y.pt"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_packed(tmp_path / name)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@both
def test_a_long_file_cut_anywhere_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save({"w": torch.randint(1, 255, (9_000,), dtype=torch.uint8)}, path)
    whole = path.read_bytes()
    for size in (*range(4_000, len(whole), 501), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged, cut off, or another kind"):
            load_packed(path)


BOOL = {"dtype": "bool", "shape": [2]}
JOINED = {**BOOL, "stream": 0, "shift": 0}


def headed(entries, *streams, **more):
    return {"entries": entries, "streams": list(streams), "modules": None, **more}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"entries": {}},
        {"entries": {}, "modules": None},
        headed({"x": {"same": "y"}}),
        headed({"x": {"same": ["x"]}}),
        headed({"x": "y"}),
        *({**headed({}), "streams": streams} for streams in (1, {"0": 0}, "0", None)),
        headed({"x": {**BOOL, "stream": 0}}, *range(9)),
        headed({"x": {"dtype": "float32"}}),
        headed({}, modules=[1]),
        headed({}, modules=3),
        headed({}, metadata="x"),
        headed({"x": BOOL}, 0),
        headed({}, 0),
        *(
            headed({"x": {**BOOL, "stream": 0}}, size)
            for size in (0, 1, -1, 2**40, 2**80, "0", None)
        ),
        *(headed({"x": {**BOOL, "stream": place}}, 0) for place in (1, -1, 2**80, "0", None, [])),
        headed({"x": {**BOOL, "shape": [2**40], "stream": 0}}, 0),
        headed({"x": {**JOINED, "shape": [2**40]}, "y": JOINED}, 0),
        headed({"x": JOINED, "y": {**JOINED, "dtype": "int8"}}, 0),
        headed({"x": JOINED, "y": {**BOOL, "stream": 0}}, 0),
        headed({"x": {**BOOL, "stream": 0}, "y": {**BOOL, "stream": 0}}, 0),
        *(headed({"x": JOINED, "y": {**JOINED, "shift": s}}, 0) for s in (-1, 2**80, "0", None)),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    save_header(tmp_path / "x.pt", headers.packed_header(header))
    with pytest.raises(ValueError, match="damaged"):
        load_packed(tmp_path / "x.pt")


@pytest.mark.parametrize("nbytes", [0, 1, -1, 2**40, 2**80, "0", None])
def test_a_header_of_version_3_that_lies_is_refused(tmp_path, nbytes):
    header = {"entries": {"x": {**BOOL, "nbytes": nbytes}}, "modules": None}
    save_header(tmp_path / "x.pt", headers.packed_header(header), version="3")
    with pytest.raises(ValueError, match="damaged"):
        load_packed(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "entry",
    [
        {"same": "y"},
        {"same": ["x"]},
        {"dtype": 3, "shape": [2], "stream": 0},
        *({"dtype": "bool", "shape": shape, "stream": 0} for shape in (None, "38", [2.0], [[2]])),
        {"dtype": "bool", "stream": 0},
    ],
    ids=str,
)
def test_a_tensor_that_cannot_be_is_refused_by_the_commands(tmp_path, entry):
    header = headed({"x": entry}, *([0] if "stream" in entry else []))
    save_header(tmp_path / "x.pt", headers.packed_header(header))
    with pytest.raises(ValueError, match='no intact "x"'):
        open_checkpoint(str(tmp_path / "x.pt"))


OTHER_KINDS = {
    "a row": lambda x: x[None],
    "one number": lambda x: x[0],
    "of another dtype": lambda x: x.view(torch.int8),
    "of float": lambda x: x.float(),
    "without values": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a list": lambda x: x.tolist(),
    "with a byte more": lambda x: torch.cat([x, x[:1]]),
    "with a byte less": lambda x: x[:-1],
}


@pytest.mark.parametrize("part", ["tensors", "header"])
@pytest.mark.parametrize("kind", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_bytes_of_another_kind_are_refused(tmp_path, part, kind):
    save(small(), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt")
    torch.save({**content, part: kind(content[part])}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="It is damaged"):
        load_packed(tmp_path / "x.pt")


def save_header(path, packed, **metadata):
    tensors = torch.empty(0, dtype=torch.uint8)
    torch.save({**headers.metadata(), **metadata, "header": packed, "tensors": tensors}, path)


def test_a_header_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "LONGEST", 10_000)
    with pytest.raises(ValueError, match="of at most 10,000 bytes as JSON; got 10,0"):
        save({"x": "x" * 10_000}, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())
    for text in (b" " * 10_001, b"0" * (1 << 22)):
        packed = torch.frombuffer(bytearray(zlib.compress(text)), dtype=torch.uint8)
        save_header(tmp_path / "x.pt", packed)
        with pytest.raises(ValueError, match="no intact header"):
            load_packed(tmp_path / "x.pt")


@pytest.mark.parametrize("version", ["5", "5.0", "17"])
def test_any_later_version_says_so(tmp_path, version):
    save_header(tmp_path / "x.pt", headers.packed_header(headed({})), version=version)
    with pytest.raises(ValueError, match=f"version {version}; this one reads 1 to 4. Up"):
        load_packed(tmp_path / "x.pt")


@both
@pytest.mark.parametrize("read", [load_packed, open_checkpoint])
def test_a_dtype_of_a_later_torch_is_named(tmp_path, suffix, read, monkeypatch):
    path = tmp_path / f"x{suffix}"
    save({"x": torch.eye(2)}, path)
    monkeypatch.delattr(torch, "float32")
    with pytest.raises(NotImplementedError, match="holds float32, which this torch does not"):
        read(str(path))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "parasparse-packed", "version": "1", "header": Harmful()}, "x.pt")
    with pytest.raises(ValueError, match="code in it has not been run"):
        load_packed("x.pt")
    assert not (tmp_path / "harm").exists()
