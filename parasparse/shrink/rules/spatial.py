"""Pooling, resizing, padding and Fourier transforms: channels go through."""

from itertools import pairwise

import torch

from parasparse.shrink.calls import Call
from parasparse.shrink.facts import (
    KNOWN,
    UNKNOWN,
    ZERO,
    Facts,
    facts,
    lowest_along,
    with_zeros,
    worst,
)  # fmt: skip
from parasparse.shrink.labels import along, fixed_along, varies, varying
from parasparse.shrink.rules.products import only_zeros
from parasparse.shrink.tracing import Rule, Trace


def _resized(trace: Trace, call: Call) -> list[Facts]:
    x, outs = call.args[0], call.outs()
    padding = call.arg(3, "padding", 0) if call.name.startswith("avg_pool") else 0
    pads_zeros = any(padding) if isinstance(padding, (tuple, list)) else padding != 0
    depends_on_size = pads_zeros or call.name in _FOURIER
    found = []
    for out in outs:
        changed = [d for d in range(x.ndim) if out.ndim == x.ndim and out.shape[d] != x.shape[d]]
        dims = _dims(call)
        labels = []
        for label in trace.labels(x):
            if out.ndim != x.ndim or any(varies(label, dim) for dim in {*dims, *changed}):
                trace.ties.pin(label, f"{call.name} over channels")
                continue
            for dim in changed:
                label = fixed_along(label, dim, out.shape[dim])
            labels.append(label)
        state = worst(trace.state(x), dims, x.shape)
        state = only_zeros(state) if depends_on_size else state
        for dim in range(min(x.ndim, out.ndim)):
            if state.shape[dim] != out.shape[dim]:
                state = fixed_along(state, dim, out.shape[dim])
        found.append(facts(labels, with_zeros(state, out)))
    return found


def _dims(call: Call) -> list[int]:
    """Return the dimensions that an operation works along, such as the last two: `avg_pool2d`."""
    ndim = call.args[0].ndim
    if call.name in _FOURIER:
        return [dim % ndim for dim in call.args[1]]
    number = next(int(a) for a, b in pairwise(call.name) if b == "d" and a.isdigit())
    return list(range(ndim - number, ndim))


def _sampled(trace: Trace, call: Call) -> list[Facts]:
    """Places are picked by the input, in all channels: (N, C, ...) to (M, C, ...)."""
    x, (out,) = call.args[0], call.outs()
    labels = []
    for label in trace.labels(x):
        if varying(label) == (1,):
            ids = label.select(0, 0).flatten(1)[:, 0]
            labels.append(along(ids, 1, out.shape))
        else:
            trace.ties.pin(label, f"{call.name} along channels")
    for tensor in call.tensors()[1:]:
        for label in trace.labels(tensor):
            trace.ties.pin(label, "places that are picked")
    state = lowest_along(trace.state(x), 1)
    state = torch.where(state == ZERO, KNOWN, UNKNOWN).to(torch.uint8)
    return [facts(labels, with_zeros(along(state, 1, out.shape), out))]


_FOURIER = ("_fft_r2c", "_fft_c2r", "_fft_c2c")
SPATIAL: dict[str, Rule] = {
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d", "roi_align", "roi_pool"), _sampled),
    **dict.fromkeys((
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_max_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "upsample_linear1d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", *_FOURIER,
), _resized),
}  # fmt: skip
