"""Sharded tensors (torch's DTensor), of which each process has a part.

`fully_shard` and `parallelize_module` shard weights. The part of a plain tensor is the tensor
itself, so code that works on parts also works on plain tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    # Most calls are for plain tensors, which need no import. A Proxy has every attribute.
    if type(tensor) in PLAIN or not hasattr(tensor, "device_mesh"):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def same_layout(one: Any, two: Any) -> bool:
    """Whether both are DTensors, and each process has the same part of both."""
    if not (is_dtensor(one) and is_dtensor(two)):
        return False
    return (one.device_mesh, one.placements) == (two.device_mesh, two.placements)


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` on this process, detached, in the same memory."""
    if not is_dtensor(tensor):
        return tensor.detach()
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # no graph, no hooks
    return part.detach()


def from_local(part: Tensor, like: Any) -> Tensor:
    """Return the tensor with the layout of `like` whose part on this process is `part`."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    layout = like.device_mesh, like.placements
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, *layout, run_check=False, shape=shape, stride=stride)


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` in the layout of `like`, which has the same shape.

    A plain `value` must be the same on all processes. Each takes its part, and nothing is sent.
    """
    if not is_dtensor(like):
        return full_tensor(value)
    if same_layout(value, like):
        return value
    return from_local(_cut(full_tensor(value), like), like)


def full_tensor(tensor: Any) -> Tensor:
    """Return `tensor`, gathered from all processes if it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    device_type = tensor.device_mesh.device_type
    if tensor.device.type == device_type:
        return tensor.full_tensor()  # type: ignore[no-any-return]
    on_mesh: Any = from_local(to_local(tensor).to(device_type), tensor)
    return on_mesh.full_tensor().to(tensor.device)  # type: ignore[no-any-return]


def sum_over_shards(counts: Tensor, like: Any) -> Tensor:
    """Return the sum of `counts` over the processes that have different parts of `like`."""
    if not is_dtensor(like):
        return counts
    import torch.distributed as dist

    total = counts.to(like.device_mesh.device_type, copy=True)
    for dim in sharding_dims(like):
        dist.all_reduce(total, group=like.device_mesh.get_group(dim))
    return total.to(counts.device)


def sharding_dims(tensor: Any) -> list[int]:
    """Return the dimensions of the mesh along which processes have different parts."""
    return [dim for dim, placed in enumerate(tensor.placements) if not placed.is_replicate()]


def shard_key(tensor: Any) -> tuple[Any, ...] | None:
    """Return a key that is equal for tensors whose counts can be summed together."""
    return (tensor.device_mesh, tuple(sharding_dims(tensor))) if is_dtensor(tensor) else None


def count_nonzero(mask: Tensor) -> int:
    """Return the number of entries of `mask` that are not 0, on all processes."""
    return int(sum_over_shards(to_local(mask).count_nonzero(), mask))


def fill_(tensor: Tensor, entries: Tensor, value: float) -> None:
    """Set `tensor` to `value` where `entries`, a bool mask of its shape, is True."""
    part = to_local(tensor)
    with torch.no_grad():
        part.masked_fill_(to_local(laid_out_like(entries, tensor)).to(part.device), value)


def on_local(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an entrywise `function` to tensors of the same layout.

    It gets the parts of DTensors, without a graph, because DTensor does not support all operators.
    """
    if not is_dtensor(tensors[0]):
        return function(*tensors)
    return from_local(function(*map(to_local, tensors)), tensors[0])


def global_indices(tensor: Tensor, flat: Tensor) -> Tensor:
    """Return the flat indices in `tensor` for flat indices in the part of this process."""
    if not is_dtensor(tensor):
        return flat
    part, found = to_local(tensor), torch.zeros_like(flat)
    step, inner = 1, 1
    for dim in reversed(range(tensor.ndim)):
        shape = [size if d == dim else 1 for d, size in enumerate(tensor.shape)]
        indices = torch.arange(tensor.shape[dim], device=tensor.device).view(shape)
        own = _cut(indices, tensor, only=dim).flatten().to(flat.device)
        found += own[flat // inner % max(1, part.shape[dim])] * step
        step, inner = step * tensor.shape[dim], inner * part.shape[dim]
    return found


def is_sharded_along(tensor: Any, dim: int) -> bool:
    """Whether processes have different stretches of dimension `dim`."""
    placements = tensor.placements if is_dtensor(tensor) else ()
    return any(getattr(placed, "dim", None) == dim % tensor.ndim for placed in placements)


def _cut(value: Tensor, like: Any, *, only: int | None = None) -> Tensor:
    """Return this process's part of `value` in the layout of `like`, along `only` or all dims."""
    place = like.device_mesh.get_coordinate()
    # `fully_shard` cuts the parts of the other mesh dimensions, although its dimension comes first.
    dims = sharding_dims(like)
    dims.sort(key=lambda dim: hasattr(like.placements[dim], "split_factor"))
    for dim in dims:
        along = like.placements[dim].dim
        if only is None or along == only:
            chunks = value.chunk(like.device_mesh.size(dim), along)
            inside = place[dim] < len(chunks)
            value = chunks[place[dim]] if inside else value.narrow(along, 0, 0)
    return value.contiguous()
