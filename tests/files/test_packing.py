"""unpack(pack(x)) is x bit for bit, and structured zeros cost next to nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parasparse.files import packing
from parasparse.files.bits import pack_bits, unpack_bits
from parasparse.files.codes.tensors import decode, encode
from parasparse.files.packing import pack, unpack

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.bool,
]
SHAPES = [
    (), (0,), (1,), (7,), (64,), (3, 0), (0, 5), (1, 9), (9, 1), (5, 7), (8, 12), (128, 64),
    (4, 3, 2), (4, 3, 1, 1), (6, 4, 3, 3), (3, 1, 3, 3), (2, 0, 3),
]  # fmt: skip
MASKS = ["entries", "rows", "columns", "kernels", "blocks", "all", "none", "one"]


def bits(tensor):
    """Return the bytes of `tensor`, in the order of its indices."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same(one, two):
    assert one.dtype == two.dtype
    assert one.shape == two.shape
    return torch.equal(bits(one), bits(two))


def drawn_mask(kind, shape, generator):
    rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    inner = math.prod(shape[2:])
    unit = {
        "rows": (1, rest), "columns": (rows, inner), "kernels": (1, inner), "blocks": (4, 4)
    }.get(kind, (1, 1))  # fmt: skip
    grid = [-(-n // max(u, 1)) for n, u in zip((rows, rest), unit, strict=True)]
    share = {"all": 1.0, "none": 0.0}.get(kind, 0.3)
    mask = torch.rand(grid, generator=generator) < share
    full = mask.repeat_interleave(max(unit[0], 1), 0).repeat_interleave(max(unit[1], 1), 1)
    full = full[:rows, :rest].reshape(shape).clone()
    if kind == "one" and full.numel():
        full.zero_().view(-1)[-1] = True
    return full


def drawn_tensor(dtype, shape, kind, seed):
    """Return any bit patterns where the mask is, nan payloads and -0.0 among them; 0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    number = math.prod(shape)
    raw = torch.randint(0, 256, (number, dtype.itemsize), generator=generator, dtype=torch.uint8)
    if dtype == torch.bool:
        raw.bitwise_and_(1)
    elif dtype.is_floating_point:  # -0.0, little-endian
        raw[::3] = torch.tensor([0] * (dtype.itemsize - 1) + [128], dtype=torch.uint8)
    raw *= drawn_mask(kind, shape, generator).reshape(-1, 1)
    return raw.flatten().view(dtype).view(shape)


@given(
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES) | st.lists(st.integers(0, 20), max_size=4).map(tuple),
    st.sampled_from(MASKS),
    st.integers(0, 2**31),
)
def test_unpacking_gives_back_every_bit(dtype, shape, kind, seed):
    tensor = drawn_tensor(dtype, shape, kind, seed)
    before = tensor.clone()
    packed = pack({"x": tensor})["x"]
    assert packed.values.dtype == dtype
    assert packed.nbytes <= tensor.nbytes
    assert same(unpack({"x": packed})["x"], tensor)
    assert same(tensor, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_every_dtype_shape_and_mask_comes_back(dtype, kind):
    state = {str(shape): drawn_tensor(dtype, shape, kind, 0) for shape in SHAPES}
    unpacked = unpack(pack(state))
    assert all(same(unpacked[name], tensor) for name, tensor in state.items())


def test_minus_zero_and_nan_payloads_are_kept_and_zero_is_not():
    words = [0, -(2**31), 0x7FC00001, 0x7F800001, -0x3FFFFE, 0, 0x7F800000, 1]  # and infinity, tiny
    tensor = torch.tensor(words * 8, dtype=torch.int32).view(torch.float32)
    packed = pack({"x": tensor})["x"]
    assert packed.values.view(torch.int32)[:6].tolist() == [word for word in words if word]
    assert same(unpack({"x": packed})["x"], tensor)


def test_a_complex_entry_is_kept_if_either_part_is_not_zero():
    tensor = torch.zeros(64, dtype=torch.complex128)
    tensor[1], tensor[2], tensor[3] = 1.0, 1j, complex(0.0, -0.0)
    packed = pack({"x": tensor})["x"]
    assert packed.values.shape == (3,)
    assert same(unpack({"x": packed})["x"], tensor)


@given(st.lists(st.booleans(), max_size=100))
def test_bits_are_numpys_and_come_back(bools):
    flags = torch.tensor(bools, dtype=torch.bool)
    packed = pack_bits(flags)
    assert packed.numpy().tolist() == np.packbits(np.array(bools, bool), bitorder="little").tolist()
    assert unpack_bits(packed, len(bools)).tolist() == bools


def masked(shape, unit, kept, dtype=torch.float32):
    """Return a tensor whose first `kept` units, as `Packed` counts them, are ones."""
    rows, columns = shape[0], math.prod(shape[1:])
    grid = torch.zeros(rows // unit[0], columns // unit[1])
    # Not next to each other: else coarser units would do.
    grid.view(-1)[torch.randperm(grid.numel())[:kept]] = 1.0
    return torch.kron(grid, torch.ones(unit)).view(shape).to(dtype)


STRUCTURES = {
    "rows": ((64, 48), (1, 48), 20),
    "columns": ((64, 48), (64, 1), 20),
    "channels_0_of_a_convolution": ((32, 16, 3, 3), (1, 144), 9),
    "channels_1_of_a_convolution": ((32, 16, 3, 3), (32, 9), 5),
    "kernels": ((32, 16, 3, 3), (1, 9), 100),
    "rows_of_a_stack": ((6, 10, 8), (1, 8), 20),
    "blocks_4": ((64, 96), (4, 4), 60),
    "blocks_8": ((64, 96), (8, 8), 30),
    "blocks_16": ((128, 96), (16, 16), 15),
    "blocks_32": ((128, 192), (32, 32), 8),
    "blocks_64": ((256, 192), (64, 64), 5),
    "blocks_of_a_convolution": ((32, 16, 3, 3), (16, 16), 4),
    "entries": ((64, 48), (1, 1), 300),
    "entries_of_a_vector": ((640,), (1, 1), 64),
    "entries_where_no_block_fits": ((63, 47), (1, 1), 300),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize(("shape", "unit", "kept"), STRUCTURES.values(), ids=STRUCTURES)
def test_structured_masks_take_the_bytes_of_what_is_kept(shape, unit, kept, dtype):
    tensor = masked(shape, unit, kept, dtype)
    packed = pack({"x": tensor})["x"]
    assert packed.unit == unit
    units = tensor.numel() // math.prod(unit)
    assert packed.nbytes == kept * math.prod(unit) * dtype.itemsize + -(-units // 8)
    assert (packed.values != 0).all()
    assert same(unpack({"x": packed})["x"], tensor)


def test_dense_tensors_take_no_bits_and_zeros_take_one_byte():
    packed = pack({"dense": torch.ones(5, 7), "zeros": torch.zeros(500, 70)})
    assert packed["dense"].bits is None
    assert packed["dense"].nbytes == 140
    assert packed["zeros"].nbytes == 1
    assert pack({"almost": torch.arange(64)})["almost"].nbytes == 63 * 8 + 8
    assert pack({"almost": torch.arange(64, dtype=torch.uint8)})["almost"].bits is None


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.14), (torch.bfloat16, 0.17)])
def test_a_tenth_of_the_entries_takes_a_tenth_of_the_bytes_and_a_bit_each(dtype, most):
    weight = torch.where(torch.rand(512, 512) < 0.1, torch.randn(512, 512), 0.0)
    assert pack({"x": weight.to(dtype)})["x"].nbytes <= most * 512 * 512 * dtype.itemsize


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2, 1::3],
        lambda x: x[:1].expand(5, -1),
        lambda x: x.view(4, 2, 6, 1).to(memory_format=torch.channels_last),
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch.complex(x, x).conj().imag,
        nn.Parameter,
    ],
    ids=["transposed", "sliced", "expanded", "channels_last", "conj", "neg", "parameter"],
)
def test_views_of_every_kind_are_packed_as_they_read(view):
    tensor = view(torch.randn(8, 6) * (torch.rand(8, 6) < 0.2))
    unpacked = unpack(pack({"x": tensor}))["x"]
    assert unpacked.is_contiguous()
    assert not unpacked.requires_grad
    assert same(unpacked, tensor.detach().resolve_conj().resolve_neg())


STRIDED = {
    "every third": lambda x: x.flatten()[::3],
    "one in a row of steps": lambda x: x.flatten()[5:6].as_strided((1,), (7,)),
    "one by one": lambda x: x.T[:1, :1],
    "none": lambda x: x.flatten()[:0:2],
    "one for all": lambda x: x[1, 1].expand(4, 5),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.complex128], ids=str)
def test_whatever_the_strides_are_entries_come_back(view, dtype):
    tensor = view(torch.randn(6, 8).to(dtype))
    assert same(unpack(pack({"x": tensor}))["x"], tensor)
    assert same(decode(encode(tensor), dtype, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("start", [torch.eye(8), torch.ones(8, 8)], ids=["sparse", "dense"])
def test_nothing_is_shared_with_what_went_in(start):
    tensor = start.clone()
    packed = pack({"x": tensor})
    tensor.fill_(2.0)
    unpacked = unpack(packed)["x"]
    assert torch.equal(unpacked, start)
    unpacked.fill_(3.0)
    assert torch.equal(unpack(packed)["x"], start)


def test_a_tensor_under_two_names_is_packed_once_and_stays_one():
    weight, other = torch.eye(8), torch.eye(8)
    state = {"a": weight, "b": other, "c": weight.detach(), "d": weight.view(64), "e": weight.T}
    packed = pack(state)
    assert packed["c"] is packed["a"]
    assert len({id(p) for p in packed.values()}) == 4
    unpacked = unpack(packed)
    assert unpacked["c"] is unpacked["a"]
    assert list(unpacked) == list(state)
    assert all(same(unpacked[name], state[name]) for name in state)


def test_conjugates_and_empty_tensors_are_not_taken_for_one():
    z = torch.complex(torch.eye(4), torch.eye(4))
    empty = torch.zeros(0)
    state = {"z": z, "conj": z.conj(), "one": empty, "two": empty.view(0)}
    unpacked = unpack(pack(state))
    assert torch.equal(unpacked["conj"], z.conj().resolve_conj())
    assert unpacked["one"] is not unpacked["two"]


def test_what_is_no_tensor_passes_through():
    extra = {"steps": 3}
    unpacked = unpack(pack({"x": torch.eye(2), "_extra_state": extra, "none": None}))
    assert unpacked["_extra_state"] is extra
    assert unpacked["none"] is None


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "of layout torch.sparse_coo"),
        (lambda: torch.empty(2, device="meta"), "on the meta device"),
        (
            lambda: torch._make_per_tensor_quantized_tensor(torch.ones(2, dtype=torch.int8), 1, 0),
            "quantized",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.strided), "nested"),
    ],
    ids=["sparse", "meta", "quantized", "nested"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of nested and quantized ones
def test_tensors_that_are_not_dense_are_refused_by_name(make, kind):
    with pytest.raises(ValueError, match=f'"a.weight" is {kind}'):
        pack({"fine": torch.ones(2), "a.weight": make()})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_on_a_gpu_gives_the_same_parts(dtype):
    for kind in MASKS:
        for shape in SHAPES:
            tensor = drawn_tensor(dtype, shape, kind, 0)
            packed, expected = pack({"x": tensor.cuda()})["x"], pack({"x": tensor})["x"]
            assert packed.unit == expected.unit
            assert packed.values.is_cuda
            assert same(packed.values.cpu(), expected.values)
            assert same(unpack({"x": packed})["x"].cpu(), tensor)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": torch.ones(2, dtype=torch.int32)}, "must be torch.float32"),
        ({"unit": (0, 1)}, "must divide 4 x 4"),
        ({"unit": (3, 1)}, "must divide 4 x 4"),
        ({"bits": torch.ones(2, dtype=torch.int64)}, "its `bits` be uint8"),
        ({"bits": torch.ones(3, dtype=torch.uint8)}, "`bits` of a `Packed` must hold 2 entries"),
        ({"values": torch.ones(3)}, "`values` of a `Packed` must hold 2 entries"),
    ],
    ids=str,
)
def test_parts_that_do_not_belong_together_are_refused(change, text):
    tensor = torch.zeros(4, 4)
    tensor[1, 2] = tensor[3, 1] = 1
    packed = dataclasses.replace(pack({"x": tensor})["x"], **change)
    with pytest.raises(ValueError, match=text):
        unpack({"x": packed})


def test_more_than_a_slice_of_places(monkeypatch):
    monkeypatch.setattr(packing, "_SLICE", 16)
    for numel in (15, 16, 17, 1_000):
        tensor = torch.where(torch.rand(numel) < 0.3, torch.randn(numel), 0.0)
        assert torch.equal(unpack(pack({"x": tensor}))["x"], tensor)
