"""What each function of torch states of sizes: how its arguments and results must fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parasparse.shrink import pieces, recurrent
from parasparse.shrink.calls import tensors_among
from parasparse.shrink.expressions import Span, span
from parasparse.shrink.facts import facts
from parasparse.shrink.function_names import FACTORIES, LOSSES, NORMS, SERIES, VIEWS
from parasparse.shrink.labels import along, varies, varying
from parasparse.shrink.outside_torch import REPLACED
from parasparse.shrink.sizes import Size, expression, numbers, plain
from parasparse.shrink.tracing import Trace

SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


def sizes_of(trace: Trace, tensor: Tensor) -> torch.Size:
    """Return the shape of `tensor`, whose sizes remember that they are of this tensor."""
    sizes = list(SHAPE(tensor))
    with torch._C._DisableTorchDispatch():
        for label in trace.labels(tensor):
            for dim, size in enumerate(sizes):
                if varies(label, dim):
                    sizes[dim] = Size(int(size), span(label, dim))
    return torch.Size(sizes)


def _require(trace: Trace, size: Any, tensor: Tensor, dim: int, where: str) -> None:
    """Remember that `tensor` must have `size` along `dim`."""
    if not isinstance(size, int) or size < 0:
        return
    there = [label for label in trace.labels(tensor) if varies(label, dim % label.ndim)]
    for label in there:
        trace.require(expression(size), span(label, dim), where)
    if isinstance(size, Size) and size > 1 and not there and tensor.stride(dim):
        _keep_size(trace, size, where, f"{where} to a size that stays")


def _flat(sizes: tuple[Any, ...]) -> list[Any]:
    single = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
    return list(sizes[0]) if single else list(sizes)


def _viewed(name: str) -> Callable[..., None]:
    def check(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
        sizes = _flat(args[1:] or tuple(kwargs.values()))
        if not all(isinstance(size, int) for size in sizes) or len(sizes) != out.ndim:
            return
        if name in ("expand", "broadcast_to"):
            _follow_sizes(trace, args[0], sizes, out)
        for dim, size in enumerate(sizes):
            _require(trace, size, out, dim, name)

    return check


def _follow_sizes(trace: Trace, tensor: Tensor, sizes: Sequence[Any], out: Tensor) -> None:
    """Give labels to dimensions in which `tensor` is expanded to the size of another tensor."""
    spans = [isinstance(s, Size) and isinstance(expression(s), Span) for s in sizes]
    dims = [dim for dim, is_span in enumerate(spans) if is_span and out.stride(dim) == 0]
    _label_copies(trace, tensor, sizes, out, dims)


def _label_copies(
    trace: Trace, tensor: Tensor, sizes: Sequence[Any], out: Tensor, dims: Sequence[int]
) -> None:
    """Give labels to those of `dims` in which `out` holds copies of the one entry of `tensor`."""
    shape = [1] * (out.ndim - tensor.ndim) + list(SHAPE(tensor))
    new = [dim for dim in dims if shape[dim] == 1 < sizes[dim]]
    labels = [along(trace.ties.new(plain(sizes[dim])), dim, out.shape) for dim in new]
    trace.set_facts(out, facts([*trace.labels(out), *labels], trace.state(out)))


def _like(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """A tensor gets the sizes of another one."""
    sizes = sizes_of(trace, args[1] if len(args) > 1 else kwargs["other"])
    _follow_sizes(trace, args[0], sizes, out)
    for dim, size in enumerate(sizes):
        _require(trace, size, out, dim, "expand_as")


def _broadcast(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Tensors are repeated to the sizes of each other."""
    tensors = tensors_among(args)
    sizes: list[Any] = list(SHAPE(out[0]))
    for tensor in tensors:
        for dim, size in enumerate(sizes_of(trace, tensor), len(sizes) - tensor.ndim):
            sizes[dim] = size if isinstance(size, Size) else sizes[dim]
    for tensor, each in zip(tensors, out, strict=True):
        _follow_sizes(trace, tensor, sizes, each)
        for dim, size in enumerate(sizes):
            _require(trace, size, each, dim, "broadcast_tensors")


def _repeated(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = _flat(args[1:] or tuple(kwargs.values()))
    dims = [dim for dim, size in enumerate(sizes) if isinstance(size, Size)]
    if len(sizes) == out.ndim:
        _label_copies(trace, args[0], sizes, out, dims)
        for dim in dims:
            if out.shape[dim] == sizes[dim]:
                _require(trace, sizes[dim], out, dim, "repeat")


def _unflattened(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].ndim
    for offset, size in enumerate(args[2] if len(args) > 2 else kwargs["sizes"]):
        _require(trace, size, out, dim + offset, "unflatten")


def _made(name: str) -> Callable[..., None]:
    def check(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
        rest = args[1:] if name.startswith("new_") else args
        sizes = _flat(rest)
        if "full" in name:
            sizes = _flat(rest[:1])
            value = rest[1] if len(rest) > 1 else kwargs.get("fill_value")
            numbers.get().extend([value.expression] if isinstance(value, Size) else [])
        sizes = sizes or _flat((kwargs.get("size", ()),))
        if len(sizes) != out.ndim:
            return
        labels = [
            along(trace.ties.new(plain(size)), dim, out.shape)
            for dim, size in enumerate(sizes)
            if isinstance(size, Size) and size > 1
        ]
        if labels:
            trace.set_facts(out, facts(labels, trace.state(out)))
            for dim, size in enumerate(sizes):
                _require(trace, size, out, dim, name)

    return check


def _numbered(name: str) -> Callable[..., None]:
    """Return what keeps the size of a tensor whose values are others if it is smaller."""

    def check(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
        for size in tree_leaves((args, kwargs)):
            if isinstance(size, Size) and size > 1:
                _keep_size(trace, size, name, f"{name} of how many there are")

    return check


def _keep_size(trace: Trace, size: Size, where: str, reason: str) -> None:
    stays = trace.ties.new(plain(size))
    trace.ties.pin(stays, reason)
    trace.require(size.expression, span(stays, 0), where)


def _convolved(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if plain(groups) == 1:
        return
    dim = out.ndim - 1 - len(SHAPE(args[1] if len(args) > 1 else kwargs["weight"])[2:])
    _require_groups(trace, args[0] if args else kwargs["input"], dim, groups, "convolution")


def _group_normed(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = args[1] if len(args) > 1 else kwargs["num_groups"]
    _require_groups(trace, args[0] if args else kwargs["input"], 1, groups, "group_norm")


def _require_groups(trace: Trace, x: Tensor, dim: int, groups: int, where: str) -> None:
    for label in trace.labels(x):
        if varies(label, dim):
            apart = label.movedim(dim, 0).unflatten(0, (plain(groups), -1))
            trace.require(expression(groups), span(apart, 0), where)


def _keeping(reason: str) -> Callable[..., None]:
    """Return what keeps all channels of the tensors that a function gets."""

    def check(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
        for tensor in tensors_among([*args, *kwargs.values()]):
            for label in trace.labels(tensor):
                trace.ties.pin(label, reason)

    return check


def _scaled(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """Without a `scale`, the size of the queries decides it."""
    if (args[6] if len(args) > 6 else kwargs.get("scale")) is None:
        query = args[0] if args else kwargs["query"]
        for label in trace.labels(query):
            if varying(label) == (query.ndim - 1,):
                trace.ties.pin(label, "the scale of attention depends on how many there are")


def _normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12,  # noqa: A002
    out: Any = None,
) -> Tensor:  # fmt: skip
    """`F.normalize` without its `expand_as`, which this mode does not see."""
    return torch.div(input, input.norm(p, dim, keepdim=True).clamp_min(eps), out=out)


WITHOUT_EXPAND: dict[Callable[..., Any], Callable[..., Any]] = {F.normalize: _normalize}
CHECKS: dict[str, Callable[..., None]] = {
    **{name: _viewed(name) for name in VIEWS},
    **{name: _made(name) for name in FACTORIES},
    **{name: _numbered(name) for name in SERIES},
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), _like),
    **REPLACED,
    "repeat": _repeated,
    "broadcast_tensors": _broadcast,
    "unflatten": _unflattened,
    "split": pieces.split,
    "split_with_sizes": pieces.split,
    "chunk": pieces.chunked,
    "narrow": pieces.narrowed,
    "__getitem__": pieces.indexed,
    "__setitem__": pieces.indexed,
    "multi_head_attention_forward": _keeping(
        "nn.MultiheadAttention has heads that make up its width"
    ),
    "meshgrid": _keeping("meshgrid, which repeats it"),
    **dict.fromkeys(NORMS, _keeping("a norm that returns its statistics")),
    **dict.fromkeys(LOSSES, _keeping("a loss that is divided by how many there are")),
    "scaled_dot_product_attention": _scaled,
    "group_norm": _group_normed,
    "lstm": recurrent.lstm,
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell"), recurrent.cell),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
}
