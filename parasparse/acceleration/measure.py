"""Records the uses of weights, and times each format on them."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasparse.acceleration.weight.convolution import convolution_then
from parasparse.acceleration.weight.following import Following
from parasparse.acceleration.weight.layers import Use
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from parasparse.attach.evaluating import evaluating

# Linear layers are also timed at these rows: one token, a few, a prompt.
_ROWS = (1, 8, 64)
# A format must be faster by this factor; smaller gains are within the noise of a machine.
_GAIN = 0.95
_SECONDS = 0.1
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
# They have dense kernels for several weights at once, so they are timed as a whole.
_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True)
class Measured:
    """The fastest format of one weight at one number of rows."""

    rows: int  # how often a call multiplies each entry of the weight
    format: str | None  # None: the dense kernel
    dense_ms: float | None  # None: not measured
    chosen_ms: float | None  # of the fastest format


@dataclass
class Recording:
    """The uses of weights in a run of a model."""

    uses: dict[str, list[Use | None]]  # by name; None is a use other than a multiplication
    fused: dict[nn.Module, Any] = field(default_factory=dict)  # arguments of `_FUSED` modules


def recorded(model: nn.Module, probes: Mapping[str, SparseWeight], inputs: Any) -> Recording:
    """Run `model` on `inputs` and return how the installed `probes` were used."""
    recording = Recording({name: [] for name in probes})
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _FUSED):
                hook = partial(_note, recording.fused)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for name, probe in probes.items():
            probe.seen = recording.uses[name].append
        try:
            with undisturbed(model):
                called(model, inputs)
        finally:
            for probe in probes.values():
                probe.seen = None
    return recording


def _note(fused: dict[nn.Module, Any], module: nn.Module, args: Any, kwargs: Any) -> None:
    fused[module] = args, kwargs


def called(model: nn.Module, inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode and without gradients; random generators keep their states."""
    with evaluating(model), torch.no_grad(), random_numbers_kept(model):
        yield


def random_numbers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context after which random generators have their states from before."""
    # fork_rng warns if it forks all of several devices.
    return torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda})


def guessed_uses(weight: Tensor) -> list[Use | None]:
    """Return the use of a linear layer that has not run."""
    return [Use(F.linear, torch.empty(1, weight.shape[1], device="meta"), (None,), 1)]


def time_formats(
    weights: Mapping[str, Tensor], uses: Mapping[str, list[Use | None]], names: list[str]
) -> dict[str, tuple[Measured, ...]]:
    """Return the fastest of the formats `names` for each weight and number of rows.

    Weights with the same shape, uses and about the same stored bytes are measured once.
    """
    known: dict[Any, tuple[Measured, ...]] = {}
    results = {}
    for name, weight in weights.items():
        by_rows = _by_rows([use for use in uses[name] if use and use.rows > 0], weight)
        candidates = _candidates(weight, names)
        calls = [
            (u.func, u.activation, rows, u.like.shape, *u.more[1:]) for rows, u in by_rows.items()
        ]
        size = {n: round(10 * math.log2(1 + w.bytes_stored())) for n, w in candidates.items()}
        key = repr((weight.shape, weight.stride(), weight.dtype, calls, size))
        if key not in known:
            every = [_fastest(use, candidates) for _, use in sorted(by_rows.items())]
            known[key] = (*every, *_beyond(list(by_rows.values())))
        results[name] = known[key]
    return results


def _by_rows(uses: list[Use], weight: Tensor) -> dict[int, Use]:
    linear = [use for use in uses if use.func is F.linear]
    rows = {*_ROWS, *(use.rows for use in linear)} if linear else set()
    # A new bias, because a use by a part of a fused projection has a part of the bias.
    bias = weight.new_zeros(len(weight)) if any(use.more[0] is not None for use in linear) else None
    like = torch.empty(1, weight.shape[1], device="meta")
    found = {n: Use(F.linear, like.new_empty(n, like.shape[1]), (bias,), n) for n in rows}
    known = {use.rows: use for use in uses} | found
    larger = [_larger(use) for use in uses if use.func in _CONVOLUTIONS]
    return {use.rows: use for use in larger if use is not None} | known


def _larger(use: Use) -> Use | None:
    """Return a convolution of an 8 times larger batch, where dense kernels gain; at most 32."""
    batch, *sizes = use.like.shape
    if batch > 4:
        return None
    like = use.like.new_empty(8 * batch, *sizes)
    if use.like.is_contiguous(memory_format=torch.channels_last) and like.ndim == 4:
        like = like.contiguous(memory_format=torch.channels_last)
    return replace(use, like=like, rows=8 * use.rows)


def _beyond(uses: list[Use]) -> list[Measured]:
    """Return the dense kernel for convolutions with far more rows than measured."""
    rows = [use.rows for use in uses if use.func in _CONVOLUTIONS]
    return [Measured(4 * max(rows), None, None, None)] if rows else []


def _candidates(weight: Tensor, names: list[str]) -> dict[str | None, SparseWeight]:
    """Return `weight` in each format that can hold it, and dense under None."""
    made = {name: SparseWeight(weight, ((1, name),)) for name in names}
    return {None: SparseWeight(weight)} | {n: w for n, w in made.items() if w.format_for(1)}


def _fastest(use: Use, candidates: Mapping[str | None, SparseWeight]) -> Measured:
    dense = candidates[None].plain()
    # An own generator, so measuring does not change the random numbers of the program.
    draws = torch.Generator(dense.device).manual_seed(0)
    x = torch.randn(use.like.shape, dtype=dense.dtype, device=dense.device, generator=draws)
    if x.ndim == 4 and use.like.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    calls = {
        name: _call(use, x, dense if name is None else weight)
        for name, weight in candidates.items()
    }
    with torch.no_grad():
        times = timed(calls)
    best = min(times, key=lambda name: times[name])
    best = best if times[best] < _GAIN * times[None] else None
    return Measured(use.rows, best, times[None], times[best])


def _call(use: Use, x: Tensor, weight: Tensor) -> Callable[[], object]:
    if use.activation is None:
        return partial(use.func, x, weight, *use.more)
    bias, *more = use.more
    following = Following(activation=use.activation)
    return partial(convolution_then, x, weight, bias, following, *more)


def timed(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """Return the milliseconds of each of `calls`.

    They take turns, because timings drift, and the least of each counts, because other programs
    only ever add time.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()  # fills caches; the first call may compile a kernel
    start = _clock()
    for done in range(40):
        for name, call in calls.items():
            times[name].append(_once(call))
        if done >= 4 and _clock() - start > _SECONDS:
            break
    return {name: min(every) for name, every in times.items()}


def gains(call: Callable[[], object], sparse: Callable[[], AbstractContextManager[None]]) -> bool:
    """Whether `call` is faster inside `sparse()`, measured as in `timed`."""
    dense_times: list[float] = []
    sparse_times: list[float] = []
    start, began = _clock(), time.perf_counter()
    # A model that waits for something else takes little processor time.
    while len(dense_times) < 9 or (
        _clock() - start < 2 * _SECONDS and time.perf_counter() - began < 20 * _SECONDS
    ):
        dense_times.append(_once(call))
        with sparse():
            sparse_times.append(_once(call))
    return min(sparse_times[2:]) < min(dense_times[2:])


def _once(call: Callable[[], object]) -> float:
    start = _clock()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (_clock() - start) * 1e3


def _clock() -> float:
    """Return seconds, without those of other programs where one thread does all the work."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    # The thread's time has steps of 16 ms on Windows.
    return time.thread_time() if alone and os.name == "posix" else time.perf_counter()
