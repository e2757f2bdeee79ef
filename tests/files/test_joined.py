"""Small tensors that are coded as one: the same bits come back, in fewer bytes than apart."""

import json
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.files import headers, streams
from parasparse.files.codes.bins import Bins
from parasparse.files.codes.flags import choose_flag_code
from parasparse.files.codes.head import Head, Record, pack_head
from parasparse.files.codes.joined import MOST_ENTRIES, decode_joined, encode_joined, small
from parasparse.files.codes.tensors import encode
from parasparse.files.opening import open_checkpoint
from tests.files.test_codes import DAMAGE, drawn, weights
from tests.files.test_numpy_reader import assert_read
from tests.files.test_packing import DTYPES, same

REAL = [dtype for dtype in DTYPES if not dtype.is_complex]


def network(sparsity="0.9", dtype=torch.float32, number=6):
    """Return matrices of several sizes and scales, pruned alike."""
    shapes = [(48, 64), (16, 64), (64, 16), (8, 40)]
    state = {}
    for i in range(number):
        weight = weights(sparsity, shapes[i % len(shapes)], torch.float32, i)
        state[f"layers.{i}.weight"] = (weight * 1.3**i).to(dtype)
    return state


def joined(tensors):
    """Return the bytes of tensors that are coded as one, and their shifts."""
    return encode_joined(small(tensors))


def parted(data, tensors, shifts):
    found = decode_joined(data, tensors[0].dtype, [t.numel() for t in tensors], shifts)
    return [one.view(tensor.shape) for one, tensor in zip(found, tensors, strict=True)]


@given(st.lists(drawn(), min_size=1, max_size=5))
def test_any_tensors_of_one_kind_come_back(tensors):
    parts = [(tensor, part) for tensor in tensors for part in small([tensor]) if part]
    kinds = [(tensor.dtype, part.kind) for tensor, part in parts]
    chosen = [tensor for (tensor, _), kind in zip(parts, kinds, strict=True) if kind == kinds[0]]
    if chosen:
        data, shifts = joined(chosen)
        assert all(map(same, parted(data, chosen, shifts), chosen))


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("sparsity", ["0", "0.5", "0.9", "1", "2:4"])
def test_joined_tensors_come_back_and_are_read_by_another_reader(tmp_path, dtype, sparsity):
    state = network(sparsity, dtype)
    state["tied"] = state["layers.1.weight"]
    save(state, tmp_path / "x.safetensors")
    loaded = load_packed(tmp_path / "x.safetensors")
    assert list(loaded) == list(state)
    assert all(same(loaded[name], tensor) for name, tensor in state.items())
    assert_read(tmp_path / "x.safetensors", state)


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x0001, 0x7FFF, 0xFFFF, 0x7F80, 0xFF81])
def test_entries_that_a_shift_would_make_zero_come_back(bits):
    """The second tensor has every exponent from 0x20 on, so one of them is its shift."""
    words = torch.arange(0, 1 << 16, 8).to(torch.int32).to(torch.int16)
    large = words[words & 0x7FFF >= 0x2000]
    last = torch.tensor([bits]).to(torch.int16)
    tensors = [torch.cat([some, last]).view(torch.bfloat16) for some in (words, large)]
    data, shifts = joined(tensors)
    assert shifts[0] == 0 < shifts[1]
    assert all(map(same, parted(data, tensors, shifts), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", ["0", "0.5", "0.8", "0.9", "0.95", "0.99", "2:4"])
def test_tensors_take_hardly_more_together_than_apart(sparsity, dtype):
    state = network(sparsity, dtype)
    data, _ = joined(list(state.values()))
    assert len(data) < 1.01 * sum(len(encode(tensor)) for tensor in state.values())


def quantized(weight, levels, dim):
    """Return `weight` in steps of which about `levels` occur in all, or in each row."""
    step = 2 * weight.abs().amax(dim, keepdim=True) / levels
    return (weight / step).round() * step


@pytest.mark.parametrize("seed", range(8))
def test_shifts_of_pruned_weights_are_their_scales(seed):
    """An octave is 128 steps of bfloat16; the shifts are found from a sample of the entries."""
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.randn(128, 128, generator=generator) * 2**octave for octave in range(8)]
    pruned = [torch.where(w.abs() > 1.645 * 2**i, w, 0.0).bfloat16() for i, w in enumerate(dense)]
    _, shifts = joined(pruned)
    assert all(abs(shift - shifts[0] - 128 * i) <= 4 for i, shift in enumerate(shifts))


FEW_VALUES = {
    "16 levels": lambda weight: quantized(weight, 16, (0, 1)),
    "16 levels a row": lambda weight: quantized(weight, 16, 1),
    "256 levels": lambda weight: quantized(weight.float(), 256, (0, 1)),
    "one value": lambda weight: torch.full_like(weight, weight[0, 0].item()),
    "groups": lambda weight: torch.arange(weight.numel(), dtype=torch.int32) // 128,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("few", FEW_VALUES.values(), ids=FEW_VALUES)
def test_tensors_with_few_values_keep_tables_of_their_own(few, dtype):
    """Their values differ, so that together they would take half as much again."""
    dense = [weights("0", (64, 256), torch.float32, seed) * 1.3**seed for seed in range(4)]
    state = {str(i): few(weight.to(dtype)) for i, weight in enumerate(dense)}
    state["other"] = torch.randint(-1 << 31, (1 << 31) - 1, (64, 256), dtype=torch.int32)
    apart = sum(len(encode(tensor)) for tensor in state.values())
    assert sum(written(state)["streams"]) <= 1.01 * apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_weights_pruned_by_magnitude_are_joined(sparsity, dtype):
    weight = weights("0", (256, 512), torch.float32)
    least = weight.abs().flatten().sort().values[round(sparsity * (weight.numel() - 1))]
    assert small([(weight * (weight.abs() >= least) + 0.0).to(dtype)]) != [None]


def test_only_like_tensors_are_joined(tmp_path):
    """Another sparsity, dtype or pattern, rows that are kept, and large tensors are apart."""
    state = {
        **network("0.9"),
        **{f"half.{n}": t for n, t in network("0.9", torch.bfloat16).items()},
        **{f"dense.{n}": t for n, t in network("0").items()},
        **{f"pattern.{n}": t for n, t in network("2:4").items()},
        "half.sparse": weights("0.5", (64, 64), torch.float32),
        "rows.1": weights("rows", (64, 64), torch.float32),
        "rows.2": weights("rows", (64, 64), torch.float32),
        "large": weights("0.9", (1, MOST_ENTRIES + 1), torch.float32),
        "complex.1": torch.ones(3, dtype=torch.complex64),
        "complex.2": torch.ones(3, dtype=torch.complex64),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(2.0),
    }
    header = written(state)
    together = {}
    for name, entry in header["entries"].items():
        together.setdefault(entry["stream"], []).append(name)
    found = {frozenset(names) for names in together.values()}
    for start in ("layers", "half.layers", "pattern"):
        assert frozenset(name for name in state if name.startswith(start)) in found
    assert frozenset([*(name for name in state if name.startswith("dense")), "scalar"]) in found
    for name in ("half.sparse", "rows.1", "rows.2", "large", "complex.1", "complex.2", "empty"):
        assert frozenset([name]) in found
    shifted = {name for name, entry in header["entries"].items() if "shift" in entry}
    assert shifted == {name for names in found for name in names if len(names) > 1}


def written(state):
    entries = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in state.items()
    }
    return streams.write_streams(lambda data: None, state.__getitem__, {"entries": entries})


def test_many_small_tensors_are_in_streams_of_bounded_size(monkeypatch):
    monkeypatch.setattr(streams, "_ENTRIES_AT_ONCE", 8_000)
    monkeypatch.setattr(streams, "MOST_KEPT", 300)
    state = network(number=40)
    header = written(state)
    assert [entry["shape"] for entry in header["entries"].values()] == [
        list(t.shape) for t in state.values()
    ]
    for place in range(len(header["streams"])):
        names = [n for n, entry in header["entries"].items() if entry["stream"] == place]
        assert 0 < sum(state[name].numel() for name in names) <= 8_000
        assert sum(int(state[name].count_nonzero()) for name in names[:-1]) < 300


def test_tensors_are_read_in_any_order_and_again(tmp_path):
    state = network()
    save(state, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "x.safetensors"))
    for name in (*reversed(state), *list(state)[1::2], "layers.2.weight", "layers.2.weight"):
        assert same(checkpoint.read(name), state[name])


def test_loaded_tensors_share_no_memory(tmp_path):
    save(network(), tmp_path / "x.safetensors")
    loaded = load_packed(tmp_path / "x.safetensors")
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in loaded.values())
    assert len({t.untyped_storage().data_ptr() for t in loaded.values()}) == len(loaded)


def test_damage_names_the_tensor(tmp_path):
    path, state = tmp_path / "x.safetensors", network()
    save(state, path)
    whole = path.read_bytes()
    header = written(state)
    assert len(header["streams"]) == 1
    start = whole.index(joined(list(state.values()))[0].numpy().tobytes())
    for place in range(start, start + header["streams"][0], 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match='no intact "layers.0.weight"'):
            load_packed(path)


LIES = {
    "an entry more": {"shape": [8, 41]},
    "an entry less": {"shape": [8, 39]},
    "no size": {"shape": []},
    "negative sizes": {"shape": [-8, -40]},
    "a product of more than 64 bits": {"shape": [1 << 40, 1 << 40]},
    "floats as sizes": {"shape": [8.0, 40.0]},
    "another dtype": {"dtype": "int32"},
    "a negative shift": {"shift": -1},
    "a large shift": {"shift": 1 << 15},
    "a shift of more than 64 bits": {"shift": 1 << 80},
    "a float as shift": {"shift": 1.5},
    "a text as shift": {"shift": "1"},
    "no shift": {"shift": None},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_entry_that_lies_is_refused(tmp_path, lie):
    """The bytes are intact, but not what is said of one tensor in them."""
    path = tmp_path / "x.pt"
    save(network(), path)
    content = torch.load(path)
    header = json.loads(zlib.decompress(content["header"].numpy().tobytes()))
    header["entries"]["layers.3.weight"].update(lie)
    torch.save({**content, "header": headers.packed_header(header)}, path)
    with pytest.raises(ValueError, match='no intact "layers.0.weight"'):
        load_packed(path)


def test_small_tensors_are_small():
    """Zeros take no bytes, so only a limit tells how many there may be."""
    found = streams.decoded(*zeros_joined(MOST_ENTRIES))["x"]
    assert same(found, torch.zeros(MOST_ENTRIES))
    with pytest.raises(ValueError, match="at most 262144 entries"):
        streams.decoded(*zeros_joined(1 << 40))


def zeros_joined(number):
    """Return a stream of one joined tensor that is all zero, and its entry."""
    flag_code = choose_flag_code(torch.zeros(8, dtype=torch.uint8), 0, 8)
    nothing = Record(kept=0, base=1, bits=0, nbytes=0, crc32=0)
    head = Head((1, 1), number, flag_code, [Bins((0,), (0,))] * 2, [nothing])
    entry = {"dtype": "float32", "shape": [number], "stream": 0, "shift": 0}
    return streams.Stream(["x"], pack_head(head)), {"x": entry}


def test_forged_numbers_and_pieces_are_refused():
    tensors = list(network().values())
    data, shifts = joined(tensors)
    numbers = [tensor.numel() for tensor in tensors]
    for wrong in ([*numbers[:-1], 1 << 40], [*numbers, 1 << 40], numbers[:-1], [-1, *numbers[1:]]):
        with pytest.raises(DAMAGE):
            decode_joined(data, torch.float32, wrong, shifts[: len(wrong)])
    for dtype in (torch.bfloat16, torch.complex64):
        with pytest.raises(DAMAGE):
            decode_joined(data, dtype, numbers, shifts)
    with pytest.raises(DAMAGE):  # rows, in several pieces
        decode_joined(encode(weights("rows", (64, 64), torch.float32)), torch.float32, [4096], [0])
