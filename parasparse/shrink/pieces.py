"""The pieces of tensors that a program takes: what it states of their sizes and places."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from parasparse.shrink.expressions import Computed, span
from parasparse.shrink.labels import varies
from parasparse.shrink.sizes import Size, expression, plain
from parasparse.shrink.tracing import Trace


def split(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Require the size of each piece; the rest stays one piece, no larger than the others."""
    sizes = args[1] if len(args) > 1 else next(v for k, v in kwargs.items() if k != "dim")
    dim, start = args[2] if len(args) > 2 else kwargs.get("dim", 0), 0
    for number, piece in enumerate(out):
        size = sizes[number] if isinstance(sizes, (tuple, list)) else sizes
        stop = start + piece.shape[dim]
        if start == stop:  # an empty piece stays empty
            continue
        if plain(size) != piece.shape[dim]:  # the rest, in the last piece
            for label in (each for each in trace.labels(args[0]) if varies(each, dim % each.ndim)):
                rest = span(label, dim, start, stop)
                trace.compare(Computed(operator.ge, (expression(size), rest)), True)
            size = piece.shape[dim]
        for label in trace.labels(args[0]):
            if varies(label, dim % label.ndim):
                trace.require(expression(size), span(label, dim, start, stop), "split")
                trace.least.append((label.narrow(dim, start, stop - start), min(stop - start, 1)))
        start = stop


def chunked(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Require equal chunks."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    for label in trace.labels(args[0]):
        dim %= label.ndim
        if not varies(label, dim):
            continue
        if len({piece.shape[dim] for piece in out}) > 1:
            trace.ties.pin(label, "chunks of unequal sizes")
            continue
        # Equal chunks stay equal: seen as a dimension of their own, they must stay regular.
        apart = label.unflatten(dim, (len(out), -1))
        trace.shapes.append(apart.movedim(dim, 0))
        trace.require(len(out), span(apart, dim), "chunk")


def narrowed(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """Require the start and the end of `narrow`."""
    given = dict(zip(("dim", "start", "length"), args[1:], strict=False)) | kwargs
    dim, start, length = (given[name] for name in ("dim", "start", "length"))
    _sliced(trace, args[0], dim, start, start + length)


def indexed(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """Require the starts and the ends of slices."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(i, slice) for i in index):
        return
    taken = sum(i is not None and i is not Ellipsis for i in index)
    taken += sum(i.ndim - 1 for i in index if isinstance(i, Tensor) and i.dtype == torch.bool)
    dim = 0
    for each in index:
        if each is Ellipsis:
            dim += args[0].ndim - taken
        elif isinstance(each, slice):
            stop = args[0].shape[dim] if each.stop is None else each.stop
            _sliced(trace, args[0], dim, each.start or 0, stop, each.step)
            dim += 1
        elif each is not None:
            dim += each.ndim if isinstance(each, Tensor) and each.dtype == torch.bool else 1


def _sliced(
    trace: Trace, tensor: Tensor, dim: int, start: Any, stop: Any, step: Any = None
) -> None:
    size = int(tensor.shape[dim])
    for label in trace.labels(tensor):
        if not varies(label, dim % label.ndim):
            continue
        if step not in (None, 1) or not isinstance(start, int) or not isinstance(stop, int):
            trace.ties.pin(label, "slice")
            continue
        first, last, _ = slice(plain(start), plain(stop)).indices(size)
        trace.least.append((label.narrow(dim, first, max(last - first, 0)), min(last - first, 1)))
        for bound in (start, stop):
            place = plain(bound) + size if bound < 0 else plain(bound)
            if not 0 < place < size:
                continue
            trace.least.append((label.narrow(dim, 0, place), 1))
            if not isinstance(bound, Size):
                trace.ties.pin(label, "the program takes a part of it by number")
            elif bound < 0:  # counted from the end
                trace.require(expression(-bound), span(label, dim, place, size), "slice")
            else:
                trace.require(expression(bound), span(label, dim, 0, place), "slice")
