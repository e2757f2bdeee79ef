"""The codes of packed files: what is decoded is what was coded, in few bits."""

import math
import zlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse.files import units
from parasparse.files.codes import bins, digits, offsets, places, tensors
from parasparse.files.codes.cursor import Cursor
from parasparse.files.codes.flags import Kind, _places_of_patterns
from parasparse.files.codes.numbers import NumberReader, pack_number
from parasparse.files.codes.tensors import decode, decode_rows, encode
from tests.files.test_packing import DTYPES, MASKS, SHAPES, drawn_tensor, same

PATTERNS = ["0", "0.1", "0.5", "0.9", "0.99", "1", "2:4", "4:8", "rows", "columns", "blocks"]
REAL = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]


def mask(pattern, shape, generator=None):
    """Return which entries of a matrix are kept."""
    rows, columns = shape
    if ":" in pattern:
        kept, group = map(int, pattern.split(":"))
        order = torch.rand(rows, columns // group, group, generator=generator).argsort(2)
        return (order < kept).view(shape)
    unit = {"rows": (1, columns), "columns": (rows, 1), "blocks": (16, 16)}.get(pattern, (1, 1))
    share = 0.8 if pattern.isalpha() else float(pattern)
    grid = torch.rand(rows // unit[0], columns // unit[1], generator=generator) >= share
    return grid.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)


def weights(pattern, shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = 0.02 * torch.randn(shape, generator=generator)
    return (dense * mask(pattern, shape, generator) + 0.0).to(dtype)


@st.composite
def drawn(draw):
    """Tensors of normal weights, small integers, few values, or any bits, in any pattern."""
    rows, columns = 16 * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 4))
    pattern, seed = draw(st.sampled_from(PATTERNS)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    kept = mask(pattern, (rows, columns), generator)
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["normal", "small", "few", "bits"]))
    if kind == "bits":
        size = (rows, columns, dtype.itemsize)
        raw = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        raw = raw & 1 if dtype == torch.bool else raw
        return (raw * kept.unsqueeze(2)).flatten().view(dtype).view(rows, columns)
    values = {
        "normal": torch.randn(rows, columns, generator=generator),
        "small": torch.randint(-5, 100, (rows, columns), generator=generator).float(),
        "few": torch.randn(7, generator=generator)[
            torch.randint(0, 7, (rows, columns), generator=generator)
        ],
    }[kind]
    values = values.abs() if dtype in (torch.uint8, torch.uint16) else values
    return torch.where(kept, values, 0.0).to(dtype)


@given(drawn(), st.integers(200, 2000))
def test_every_bit_comes_back(tensor, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_WORDS_OF_PIECE", size)
        coded = encode(tensor)
    assert same(decode(coded, tensor.dtype, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_shape_and_mask_comes_back(dtype):
    for shape in SHAPES:
        for kind in MASKS[::3]:
            tensor = drawn_tensor(dtype, shape, kind, 0)
            assert same(decode(encode(tensor), dtype, shape), tensor)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("number", [1, 3])
def test_rows_are_read_apart_in_any_number_of_threads(pattern, number, monkeypatch, request):
    monkeypatch.setattr(tensors, "_WORDS_OF_PIECE", 300)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(number)
    weight = weights(pattern, (64, 48), torch.float32)
    coded = encode(weight)
    assert same(decode(coded, weight.dtype, (64, 48)), weight)
    for start, stop in ((0, 0), (0, 1), (5, 6), (3, 40), (63, 64), (17, 64)):
        rows = decode_rows(coded, weight.dtype, (64, 48), start, stop)
        assert same(rows.view(-1, 48), weight[start:stop])
    assert torch.get_num_threads() == number


def test_only_the_pieces_of_the_rows_are_read(monkeypatch):
    monkeypatch.setattr(tensors, "_WORDS_OF_PIECE", 300)
    weight = weights("0.5", (64, 48), torch.float32)
    coded = encode(weight)
    coded[-1] ^= 1  # in the last piece
    assert same(decode_rows(coded, weight.dtype, (64, 48), 0, 20).view(20, 48), weight[:20])
    with pytest.raises(ValueError, match="the checksum of a piece"):
        decode_rows(coded, weight.dtype, (64, 48), 60, 64)


def entropy(weight):
    """Return the bits that places and values take at least, if each is drawn by itself."""
    integers = weight.view(torch.int16)[weight != 0]
    shares = integers.unique(return_counts=True)[1] / max(1, len(integers))
    kept = len(integers) / weight.numel()
    places_each = 0.0
    if 0 < kept < 1:
        places_each = -kept * math.log2(kept) - (1 - kept) * math.log2(1 - kept)
    return weight.numel() * places_each + len(integers) * float(-(shares * shares.log2()).sum())


@pytest.mark.parametrize("sparsity", ["0", "0.2", "0.5", "0.7", "0.8", "0.9", "0.95", "0.98"])
def test_normal_weights_take_little_more_than_their_entropy(sparsity):
    weight = weights(sparsity, (512, 512), torch.bfloat16)
    assert 8 * len(encode(weight)) < 1.04 * entropy(weight)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(64, 48), (384, 9), (48, 2)], ids=str)
@pytest.mark.parametrize("kernels", [False, True])
def test_no_unit_that_pays_is_passed_over(pattern, shape, kernels, monkeypatch):
    pattern = "0.95" if ":" in pattern or (pattern == "blocks" and shape[1] != 48) else pattern
    for dtype in (torch.float32, torch.bfloat16):
        weight = weights(pattern, shape, dtype)
        weight = weight.view(16, -1, 1, min(16, shape[1])) if kernels else weight
        whole = tuple(weight.shape)
        kept = units.kept_entries(units.words_of(weight), dtype, whole)
        number = int(kept.count_nonzero())
        found = tensors.choose_units(kept, number, dtype, whole)
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "_may_have_units", lambda *_: True)
            assert tensors.choose_units(kept, number, dtype, whole).unit == found.unit


def test_patterns_take_the_bits_of_their_patterns():
    for pattern, bits in (("2:4", 2.6 / 4), ("4:8", 7 / 8), ("1:4", 2 / 4)):
        kept = mask(pattern, (512, 512)).to(torch.uint8)  # one value, which takes nothing
        assert 8 * len(encode(kept)) < bits * kept.numel() + 2000


@pytest.mark.parametrize("end", [[], [1], [0], [0, 1], [1, 1, 0], [1, 1, 1]], ids=str)
def test_patterns_may_end_in_the_middle_of_a_group(end):
    kept = torch.cat([mask("2:4", (16, 64)).flatten(), torch.tensor(end, dtype=torch.bool)])
    for tensor in (kept, kept.float(), (kept * 7).to(torch.int16)):
        coded = encode(tensor)
        assert Cursor(coded[4:]).unpack("B")[0] & 7 == Kind.FOURS
        assert same(decode(coded, tensor.dtype, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("rows", [[1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]], ids=["4", "8"])
def test_large_units_in_a_pattern_come_back(rows):
    """A piece holds one row, so it cannot hold the pattern of several."""
    kept = torch.tensor(rows * 5, dtype=torch.bool)
    tensor = torch.where(kept.unsqueeze(1), torch.randn(len(kept), 80_000), 0.0)
    assert same(decode(encode(tensor), tensor.dtype, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize(("pattern", "wanted"), [(0b0011, [0, 1, 4]), (0b0110, [1, 2])])
def test_entries_of_a_pattern_beyond_its_piece_are_none(pattern, wanted):
    patterns, first = torch.tensor([pattern], dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    assert _places_of_patterns(patterns, first, 4, 5).tolist() == wanted


@pytest.mark.parametrize(
    ("tensor", "most"),
    [
        (torch.zeros(1 << 20), 100),
        (torch.ones(1 << 16), 200),
        (torch.arange(512), 900),
        (torch.ones(4096, dtype=torch.bool), 100),
        (torch.randn(1 << 14).bfloat16().float(), 2 * 0.75 * (1 << 14)),
        (torch.randn(1 << 14).half().double(), 2 * 0.96 * (1 << 14)),
        (torch.randint(0, 7, (1 << 14,)), 3.6 / 8 * (1 << 14)),
    ],
    ids=["zeros", "ones", "arange", "bools", "bfloat16 in float32", "half in double", "integers"],
)
def test_values_with_little_in_them_take_little(tensor, most):
    coded = encode(tensor)
    assert len(coded) < most
    assert same(decode(coded, tensor.dtype, tuple(tensor.shape)), tensor)


@given(st.lists(st.integers(0, 2**20), max_size=70), st.sampled_from([0, 1, 2, 5, 9, 16]))
def test_digits_come_back(numbers, more):
    base = digits.base_for(max(numbers, default=0) + 1 + more)
    assert max(numbers, default=0) < base
    packed = digits.pack_digits(torch.tensor(numbers, dtype=torch.int32), base)
    data = torch.cat([*packed, torch.zeros(0, dtype=torch.uint8)])
    assert len(data) == digits.digits_nbytes(len(numbers), base)
    assert digits.unpack_digits(data, len(numbers), base).tolist() == numbers


@given(
    st.lists(st.integers(0, 16).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, 2**w - 1))))
)
def test_offsets_are_the_bits_one_after_the_other(pairs):
    widths = torch.tensor([width for width, _ in pairs], dtype=torch.int32)
    numbers = torch.tensor([number for _, number in pairs], dtype=torch.int32)
    data = offsets.pack_offsets(numbers, widths)
    whole, at = 0, 0
    for width, number in pairs:
        whole, at = whole | number << at, at + width
    assert bytes(data.tolist()) == whole.to_bytes(-(-at // 8), "little")
    assert torch.equal(offsets.unpack_offsets(Cursor(data), widths), numbers)


@given(st.lists(st.integers(0, 5000), unique=True))
def test_places_come_back(numbers):
    ascending = torch.tensor(sorted(numbers), dtype=torch.int32)
    flags = torch.zeros(5001, dtype=torch.uint8).scatter_(0, ascending.long(), 1)
    packed = places.pack_places(flags, ascending)
    data = torch.cat([*packed.digits, torch.zeros(0, dtype=torch.uint8)])
    found = places.unpack_places(packed.bits, data, len(numbers), packed.base)
    assert torch.equal(found, ascending)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_places_of_flags_are_where_they_are_set(share):
    flags = (torch.rand(1001) < share).to(torch.uint8)
    assert torch.equal(places.places_of(flags), flags.nonzero().squeeze(1).int())


def test_a_third_is_exact_to_the_last_number():
    numbers = torch.cat([torch.arange(10_000), 2**31 - 1 - torch.arange(10_000)]).int()
    for base in (1, 2, 3, 6, 96, 3 << 20):
        assert torch.equal(places.divided(numbers, base), numbers.div(base, rounding_mode="trunc"))


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(1, 3000)), max_size=60))
def test_bins_hold_every_number_and_count_their_bits(pairs):
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for value, count in pairs:
        counts[value] += count
    found = bins.choose_bins(counts)
    ends = [low + (1 << width) for low, width in zip(found.lows, found.widths, strict=True)]
    assert all(end <= low for end, low in zip(ends, found.lows[1:], strict=False))
    values = counts.nonzero().squeeze(1).int()
    for coded in (found, replace(found, sign=1 << 16)):
        numbers = coded.of_numbers[values.long()]
        digits, widths, inside = numbers & 1023, numbers >> 10 & 31, numbers >> 15
        assert torch.all((inside >= 0) & (inside < 1 << widths))
        assert torch.equal(coded.of_digits[digits.long()], values - inside << 5 | widths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16], ids=str)
@pytest.mark.parametrize("number", [500, 600, 1000, 1100, 1500, 2048])
def test_any_number_of_values_with_gaps_between_them_comes_back(dtype, number):
    levels = torch.arange(0, 15 * number, 15)[torch.randint(0, number, (1 << 15,))]
    signs = torch.randint(0, 2, (1 << 15,)) * -(1 << 15)
    for words in (levels, levels + signs):
        tensor = words.to(torch.int16).view(dtype)
        assert same(decode(encode(tensor), dtype, (1 << 15,)), tensor)


@given(st.integers(0, 2**40))
def test_numbers_come_back(number):
    reader = NumberReader(pack_number(number) + b"rest")
    assert reader.number() == number
    assert reader.take(reader.left) == b"rest"
    with pytest.raises(ValueError, match="must follow"):
        NumberReader(pack_number(number)[:-1]).number()


# Readers of files turn these into a ValueError that names the file and the tensor.
DAMAGE = (ValueError, RuntimeError, IndexError)


class Fitting:
    """A checksum that fits any bytes, as one who forges a file would write it."""

    def __ne__(self, other):
        return False

    __hash__ = None

    def to_bytes(self, *_):
        return self


@pytest.mark.parametrize("pattern", ["0", "0.2", "0.9", "2:4", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_forged_bytes_are_refused_or_another_tensor_of_the_same_size(pattern, dtype, monkeypatch):
    weight = weights(pattern, (16, 16), torch.float32)
    weight = weight.to(dtype) if dtype.is_floating_point else weight.mul(900).abs().to(dtype)
    coded = encode(weight)
    monkeypatch.setattr(zlib, "crc32", lambda *_: Fitting())
    for place in range(len(coded)):
        data = coded.clone()
        data[place] ^= (1, 0x81, 0xFF)[place % 3]
        try:
            found = decode(data, dtype, (16, 16))
        except DAMAGE:
            continue
        assert found.shape == weight.shape


@pytest.mark.parametrize("pattern", ["0", "0.9", "2:4"])
def test_every_flipped_byte_and_every_truncation_is_refused(pattern):
    weight = weights(pattern, (16, 16), torch.float32)
    coded = encode(weight)
    for place in range(len(coded)):
        data = coded.clone()
        data[place] ^= 1 << place % 8
        for damaged in (data, coded[:place].clone()):
            with pytest.raises(DAMAGE):
                decode(damaged, weight.dtype, (16, 16))


def test_impossible_sizes_are_refused_before_anything_of_that_size_is_made():
    coded = encode(weights("0.9", (16, 16), torch.bfloat16))
    with pytest.raises(ValueError, match="pieces do not fit|impossible"):
        decode(coded, torch.bfloat16, (1 << 40, 1 << 20))
