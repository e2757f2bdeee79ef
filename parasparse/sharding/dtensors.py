"""Tensors that are spread over processes (torch's DTensor), of which each process holds a part.

Sharding frameworks spread weights: `fully_shard`, `parallelize_module`. A plain tensor is its own
part, so that what is written for parts holds for it as well, and costs it nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether processes hold parts of `tensor`."""
    # Plain tensors are the case that is hot, and import nothing; Proxies have every attribute.
    if type(tensor) in _PLAIN or not hasattr(tensor, "device_mesh"):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def same_layout(one: Tensor, two: Tensor) -> bool:
    """Whether both are spread, and each process holds the same part of both."""
    if not (is_dtensor(one) and is_dtensor(two)):
        return False
    a: Any = one
    b: Any = two
    return (a.device_mesh, a.placements) == (b.device_mesh, b.placements)


def to_local(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, detached, in the same memory."""
    if not is_dtensor(tensor):
        return tensor.detach()
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # no graph, no hooks
    return part.detach()


def from_local(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor of which this process holds `part`, as it does of `like`."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = like
    return DTensor.from_local(
        part,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=spread.shape,
        stride=spread.stride(),
    )


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` laid out over processes as `like` is.

    Args:
        value: of the shape of `like`; where it is plain, the same on all processes. Each takes its
            own part then, and nothing is sent.
        like: any tensor.
    """
    if not is_dtensor(like):
        return full_tensor(value)
    if same_layout(value, like):
        return value
    return from_local(_cut(full_tensor(value), like), like)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return `tensor` gathered from all processes, if it is spread over them."""
    if not is_dtensor(tensor):
        return tensor
    spread: Any = tensor
    kind = spread.device_mesh.device_type
    if tensor.device.type == kind:
        return spread.full_tensor()  # type: ignore[no-any-return]
    return from_local(to_local(tensor).to(kind), tensor).full_tensor().to(tensor.device)  # type: ignore[attr-defined, no-any-return]


def sum_over_shards(counts: Tensor, like: Tensor) -> Tensor:
    """Return the sum of `counts` over the processes that hold different parts of `like`."""
    if not is_dtensor(like):
        return counts
    import torch.distributed as dist

    spread: Any = like
    total = counts.to(spread.device_mesh.device_type, copy=True)
    for dim in sharding_dims(like):
        dist.all_reduce(total, group=spread.device_mesh.get_group(dim))
    return total.to(counts.device)


def sharding_dims(tensor: Any) -> list[int]:
    """Return the dimensions of the mesh along which processes hold different parts."""
    return [dim for dim, placed in enumerate(tensor.placements) if not placed.is_replicate()]


def shard_key(tensor: Any) -> tuple[Any, ...] | None:
    """Return what tensors have in common whose parts are counted together; None if plain."""
    if not is_dtensor(tensor):
        return None
    return tensor.device_mesh, tuple(sharding_dims(tensor))


def count_nonzero(mask: Tensor) -> int:
    """Return how many entries of `mask` are not 0, on all processes."""
    counted = to_local(mask).count_nonzero()
    return int(sum_over_shards(counted, mask))


def fill_(tensor: Tensor, entries: Tensor, value: float) -> None:
    """Set `tensor` to `value` where `entries`, a mask of its shape, is True."""
    part = to_local(tensor)
    with torch.no_grad():
        part.masked_fill_(to_local(laid_out_like(entries, tensor)).to(part.device), value)


def on_local(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `function` of tensors that are laid out alike, entry by entry.

    Of spread ones without a graph: few operators are left to DTensor, which does not know all.
    """
    if not is_dtensor(tensors[0]):
        return function(*tensors)
    return from_local(function(*map(to_local, tensors)), tensors[0])


def global_indices(tensor: Tensor, flat: Tensor) -> Tensor:
    """Return where entries of this process's part lie in the whole of `tensor`: flat indices.

    Args:
        tensor: any.
        flat: flat indices in the part, on its device.
    """
    if not is_dtensor(tensor):
        return flat
    part, found = to_local(tensor), torch.zeros_like(flat)
    step, inner = 1, 1
    for dim in reversed(range(tensor.ndim)):
        index = flat // inner % max(1, part.shape[dim])
        found += _indices(tensor, dim).to(flat.device)[index] * step
        step, inner = step * tensor.shape[dim], inner * part.shape[dim]
    return found


def is_sharded_along(tensor: Any, dim: int) -> bool:
    """Whether processes hold different stretches of dimension `dim`."""
    if not is_dtensor(tensor):
        return False
    dim %= tensor.ndim
    return any(getattr(placed, "dim", None) == dim for placed in tensor.placements)


def _indices(tensor: Any, dim: int) -> Tensor:
    """Return which indices along dimension `dim` of a spread tensor lie in this process's part."""
    shape = [size if d == dim else 1 for d, size in enumerate(tensor.shape)]
    indices = torch.arange(tensor.shape[dim], device=tensor.device).view(shape)
    return _cut(indices, tensor, only=dim).flatten()


def _cut(value: Tensor, like: Any, *, only: int | None = None) -> Tensor:
    """Return this process's part of `value`, laid out as `like`, along dimension `only` or all."""
    place = like.device_mesh.get_coordinate()
    # What `fully_shard` cuts is what other dimensions of the mesh have left, though it comes first.
    dims = sharding_dims(like)
    dims.sort(key=lambda dim: hasattr(like.placements[dim], "split_factor"))
    for dim in dims:
        along = like.placements[dim].dim
        if only is None or along == only:
            chunks = value.chunk(like.device_mesh.size(dim), along)
            inside = place[dim] < len(chunks)
            value = chunks[place[dim]] if inside else value.narrow(along, 0, 0)
    return value.contiguous()
