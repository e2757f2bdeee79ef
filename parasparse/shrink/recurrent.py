"""What recurrent layers of torch ask of their sizes, which no operation shows."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from parasparse.shrink.expressions import Computed, Expression, span
from parasparse.shrink.labels import compact, varies, varying
from parasparse.shrink.tracing import Trace


def cell(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """`nn.RNNCell` has as many outputs as hidden values, also if it gets no hidden values."""
    ids = {varying(label): compact(label).flatten() for label in trace.labels(args[3])}
    if (0,) in ids and (1,) in ids:
        trace.ties.tie(ids[0,], ids[1,])


def lstm(trace: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """An LSTM with projections must have more hidden values, or torch takes it for one without."""
    hidden, cells = next(each for each in args if isinstance(each, (tuple, list)))[:2]
    if hidden.shape[-1] != cells.shape[-1]:
        sizes = _last_size(trace, cells), _last_size(trace, hidden)
        trace.compare(Computed(operator.gt, sizes), True)


def _last_size(trace: Trace, tensor: Tensor) -> Expression:
    labels = (label for label in trace.labels(tensor) if varies(label, label.ndim - 1))
    return next((span(label, label.ndim - 1) for label in labels), int(tensor.shape[-1]))
