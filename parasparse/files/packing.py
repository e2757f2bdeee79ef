"""Tensors without their zeros: a bitmask and the kept entries. No modules, no files."""

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from parasparse.files.bits import pack_bits, unpack_bits
from parasparse.files.ties import first_names
from parasparse.files.units import (
    WORDS,
    cheapest,
    kept_entries,
    matrix,
    words_of,
    words_per_entry,
)

# Indices take 8 bytes each, so this many are made at a time.
_SLICE = 1 << 22


@dataclass(frozen=True, eq=False)
class Packed:
    """One tensor without its zeros.

    The tensor is read as a matrix (shape[0], product of the other sizes) and cut into rectangles of
    the size `unit`: (1, 1) for single entries, (1, columns) for rows, (4, 4) for blocks. Rectangles
    whose bits are all zero are dropped; the others are kept whole.

    Args:
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        unit: rows and columns of a rectangle; they divide the rows and columns of the matrix.
        bits: uint8, one bit per rectangle, row by row, 1 for kept: eight per byte from the lowest
            bit up, the last byte padded with 0. None: everything is kept.
        values: 1-D, in `dtype`: the entries of each kept rectangle in turn, row by row.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    unit: tuple[int, int]
    bits: Tensor | None
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of `bits` and `values`."""
        return self.values.nbytes + (0 if self.bits is None else self.bits.nbytes)


def pack(state_dict: Mapping[str, Any]) -> dict[str, Packed | Any]:
    """Return `state_dict` with each tensor packed in the unit that takes the fewest bytes.

    An entry is zero if all its bits are, so -0.0 and nan payloads are kept. (Multiplying by a mask
    can leave -0.0, which `+ 0.0` turns into 0.0; parasparse itself writes 0.0.) The units are
    single entries, kernels, slices along the first or second dim, and square blocks of 4 to 64 that
    divide the matrix (shape[0], product of the other sizes). A tensor may also stay dense.

    Args:
        state_dict: not changed; tensors are copied. A tensor with several names is packed once, and
            all its names share one `Packed`. Values that are not tensors are passed through.

    Raises:
        TypeError: `state_dict` is not a dict.
        ValueError: a tensor is sparse, nested, quantized, distributed or on the meta device.

    Examples:
        >>> packed = pack({"weight": torch.eye(8)})["weight"]
        >>> packed.nbytes, packed.values.tolist()
        (40, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """
    state = plain_state(state_dict)
    first = first_names(state)
    packed: OrderedDict[str, Any] = OrderedDict()
    for name, value in state.items():
        if name in first:
            packed[name] = packed[first[name]]
        else:
            packed[name] = pack_tensor(value) if isinstance(value, Tensor) else value
    return with_metadata(packed, state_dict)


def unpack(packed: Mapping[str, Packed | Any]) -> dict[str, Any]:
    """Return the state dict that `pack` was given, bit for bit.

    Tensors are new, contiguous and on the device of their packed parts. Ties are restored.

    Raises:
        ValueError: the parts of a `Packed` do not fit each other.

    Examples:
        >>> state = unpack(pack({"weight": torch.eye(2), "steps": 3}))
        >>> state["weight"].tolist(), state["steps"]
        ([[1.0, 0.0], [0.0, 1.0]], 3)
    """
    different = {id(p): p for p in packed.values() if isinstance(p, Packed)}
    tensors = {key: unpack_tensor(p) for key, p in different.items()}
    state = OrderedDict((name, tensors.get(id(value), value)) for name, value in packed.items())
    return with_metadata(state, packed)


def with_metadata(state: OrderedDict[str, Any], source: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return `state` with the module versions (`_metadata`) of `source`."""
    metadata = getattr(source, "_metadata", None)
    if metadata is not None:
        state._metadata = copy.deepcopy(metadata)  # type: ignore[attr-defined]
    return state


def plain_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return `state_dict` with detached tensors of the class Tensor, not copied.

    Raises:
        TypeError: `state_dict` is not a dict.
        ValueError: a tensor is not dense or has no values.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "`state_dict` must be a dict of tensors by name, such as `model.state_dict()`; got "
            f"{type(state_dict).__name__}."
        )
    state = {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            kind = _unpackable(value)
            if kind:
                raise ValueError(
                    f'`state_dict` must hold dense tensors with values; "{name}" is {kind}. '
                    "Make it dense, or leave it out."
                )
            state[name] = value.detach().as_subclass(Tensor)
        else:
            state[name] = value
    return state


def _unpackable(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "not initialized yet"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, which has no storage of its own"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}"
    kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized}
    kinds["on the meta device"] = tensor.is_meta
    return next((kind for kind, found in kinds.items() if found), "")


def pack_tensor(tensor: Tensor) -> Packed:
    """Return `tensor` packed in the unit that takes the fewest bytes."""
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    words = words_of(tensor)
    kept = kept_entries(words, dtype, shape)
    found = cheapest(
        kept, math.prod(shape[2:]), 8 * dtype.itemsize, lambda _, total: 8 * -(-total // 8)
    )
    if found is None:
        return Packed(dtype, shape, matrix(shape), None, words.clone().view(dtype))
    unit, grid = found.unit, found.kept
    tall, wide = unit[0], unit[1] * words_per_entry(dtype)
    cut = words.view(grid.shape[0], tall, grid.shape[1], wide).transpose(1, 2)
    cut, flat = cut.reshape(-1, tall * wide), grid.flatten()
    values = cut.new_empty(int(flat.count_nonzero()), tall * wide)
    done = 0
    for part, chosen in zip(cut.split(_SLICE), flat.split(_SLICE), strict=True):
        index = chosen.nonzero().squeeze(1)  # masked_select is 3 times slower than index_select
        torch.index_select(part, 0, index, out=values[done : done + len(index)])
        done += len(index)
    return Packed(dtype, shape, unit, pack_bits(grid), values.view(-1).view(dtype))


def unpack_tensor(packed: Packed) -> Tensor:
    """Return the tensor of `packed`; raise ValueError if its parts do not fit each other."""
    rows, columns = matrix(packed.shape)
    word = WORDS[packed.dtype.itemsize]
    if packed.values.dtype != packed.dtype:
        raise ValueError(
            f"`values` of a `Packed` must be {packed.dtype}, its `dtype`; got "
            f"{packed.values.dtype}."
        )
    if packed.bits is None:
        _check_size("values", packed.values, rows * columns)
        return packed.values.view(word).clone().view(packed.dtype).view(packed.shape)
    unit = packed.unit
    if min(unit) < 1 or rows % unit[0] or columns % unit[1] or packed.bits.dtype != torch.uint8:
        raise ValueError(
            f"`unit` of a `Packed` must divide {rows} x {columns}, and its `bits` be uint8; got "
            f"{unit} and {packed.bits.dtype}."
        )
    height, width = rows // unit[0], columns // unit[1]
    _check_size("bits", packed.bits, -(-height * width // 8))
    kept = unpack_bits(packed.bits, height * width)
    _check_size("values", packed.values, int(kept.count_nonzero()) * unit[0] * unit[1])
    tall, wide = unit[0], unit[1] * words_per_entry(packed.dtype)
    values = packed.values.view(word).view(-1, tall * wide)
    words = values.new_zeros(height * width, tall * wide)
    done = 0
    for part, chosen in zip(words.split(_SLICE), kept.split(_SLICE), strict=True):
        index = chosen.nonzero().squeeze(1)
        part.index_copy_(0, index, values[done : done + len(index)])
        done += len(index)
    joined = words.view(height, width, tall, wide).transpose(1, 2).reshape(-1)
    return joined.view(packed.dtype).view(packed.shape)


def _check_size(part: str, tensor: Tensor, size: int) -> None:
    if tensor.numel() != size:
        raise ValueError(
            f"`{part}` of a `Packed` must hold {size} entries to fit its other parts; got "
            f"{tensor.numel()}."
        )
