"""Zeros into time: masked or squashed weights that multiply sparsely."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from parasparse import _attach
from parasparse._checks import listed, nearest
from parasparse._tensors import Target, collect_as_masked
from parasparse.sparse import measure
from parasparse.sparse.acceleration import Accelerated, Acceleration
from parasparse.sparse.formats import FORMATS, formats_of
from parasparse.sparse.places import executable, installed, is_plain, put, take, weights_in
from parasparse.sparse.regular import Channels
from parasparse.sparse.weight import ON_CPU, Choices, SparseWeight

# As it is saved: {"layer.weight": [[1, "csr"], [64, None]]}, pairs of rows and format.
SavedPlan = Mapping[str, Collection[Collection[Any]]]
_LIKE_LINEAR = (nn.Linear, nn.MultiheadAttention, nn.RNNBase)
_ATTRIBUTE = "_acceleration"


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    formats: str | Collection[str] | SavedPlan | None = None,
    keep_dense: bool = True,
) -> nn.Module:
    """Let the zeros of `model` save time: its weights multiply sparsely; return the model.

    Linear, Conv1d to Conv3d, MultiheadAttention, RNN, LSTM and GRU keep their classes and their
    `state_dict`; a tensor subclass takes the place of each weight that gains. Which of the formats
    is the fastest, or whether the dense kernel is, is measured for each weight and number of rows:
    see `accelerated`. For inference alone. A weight is multiplied as its mask has it now; changing
    masks, or values through `.data`, needs `restore` first.

    Args:
        model: squashed or masked; changed in place.
        example_inputs: what the model is called with: a tensor, a tuple or a dict. None: linear
            layers are measured at 1, 8 and 64 rows, convolutions stay dense.
        formats: which may be chosen, of "csr", "bag", "bsr", "channels", "2:4"; None: any. Or the
            `plan` of an earlier `accelerated`: then nothing is measured.
        keep_dense: False frees the dense values of weights that are multiplied sparsely at each
            measured number of rows; `restore` is an error then.

    Raises:
        ValueError: no weight is at least half zeros, or lacks whole channels; a format, or a weight
            of the plan, is not known; masked weights with `keep_dense=False`.
        TypeError: such a weight on a CPU is not float32 or float64.
        RuntimeError: the model is accelerated already; a mask is not set.

    Examples:
        >>> from parasparse import sparsify
        >>> model = sparsify(nn.Linear(64, 64), 0.95)
        >>> accelerated(accelerate(model, formats={"weight": [(1, "csr")]})).plan
        {'weight': [(1, 'csr')]}
    """
    if _attach.is_accelerated(model):
        raise RuntimeError(
            "`model` must not be accelerated already. Call parasparse.restore(model) first."
        )
    plan = formats if isinstance(formats, Mapping) else None
    names = _names(formats)
    targets = _candidates(model, plan)
    if not keep_dense:
        _check_freeable(targets)
    originals = {name: executable(target) for name, target in targets.items()}
    if plan is not None:
        rows, read = _planned(plan, originals), set[str]()
    else:
        rows, read = _measured(model, example_inputs, targets, originals, names)
    kept = originals.keys() if keep_dense else {r.name for r in rows if r.format is None} | read
    for name, weight in _weights(rows, originals, kept).items():
        for site in targets[name].sites:
            put(site, weight)
    model.__dict__[_ATTRIBUTE] = Acceleration(rows)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: the Parameters, or masks, come back as they were; return the model.

    Args:
        model: changed in place. One that is not accelerated stays as it is.

    Raises:
        RuntimeError: dense values were freed with `keep_dense=False`. The model is as it was.

    Examples:
        >>> restore(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    found = list(weights_in(model))
    if any(weight.original is None for _, weight in found):
        raise RuntimeError(
            "`model` must have its dense values to be restored; `accelerate(keep_dense=False)` "
            "freed them. `model.state_dict()` still has them, computed anew, for a fresh model."
        )
    for site, weight in found:
        take(site, weight)
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
    return model


def accelerated(model: nn.Module) -> Acceleration:
    """Return what `accelerate` chose for each weight of `model` and number of rows; a table.

    Examples:
        >>> accelerated(nn.Linear(2, 2)).plan
        {}
    """
    found: Acceleration = model.__dict__.get(_ATTRIBUTE, Acceleration())
    return found


def _names(formats: Any) -> list[str]:
    if formats is None:
        return list(FORMATS)
    names = [formats] if isinstance(formats, str) else list(formats)
    if isinstance(formats, Mapping):
        names = [name for every in formats.values() for _, name in every if name is not None]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not (names or isinstance(formats, Mapping)):
        raise ValueError(f"`formats` must be of {listed(FORMATS)}; got {listed(unknown)}.")
    return names


def _candidates(model: nn.Module, plan: SavedPlan | None) -> dict[str, Target]:
    """Return the weights that may gain, by name; under a plan those that it names."""
    weights = {
        target.name: target
        for target in collect_as_masked(model, pairs=False)
        if target.ndim > 1 and (target.masks() or is_plain(target))
    }
    if plan is not None:
        unknown = [name for name in plan if name not in weights]
        if unknown:
            raise ValueError(
                f"`formats` must plan for weights of the model; {listed(unknown)} are none"
                f"{nearest(unknown[0], weights)}."
            )
        weights = {name: weights[name] for name in plan}
    found = {name: t for name, t in weights.items() if _may_gain(t.effective())}
    if not found:
        raise ValueError(
            "`model` must have a weight of which at least half are zeros, or whole channels; it "
            f"has none among {len(weights)}. Call parasparse.sparsify first."
        )
    wrong = [n for n, t in found.items() if t.stored().is_cpu and t.stored().dtype not in ON_CPU]
    if wrong:
        raise TypeError(
            f"sparse weights on a CPU must be float32 or float64; {listed(wrong)} are "
            f"{found[wrong[0]].stored().dtype}. Call `model.float()` first."
        )
    return found


def _may_gain(weight: Tensor) -> bool:
    if weight.is_meta or not weight.numel():
        return False
    return bool(2 * weight.count_nonzero() <= weight.numel()) or Channels.of(weight) is not None


def _check_freeable(targets: Mapping[str, Target]) -> None:
    masked = [name for name, target in targets.items() if target.masks()]
    if masked:
        raise ValueError(
            f"`keep_dense=False` must find plain weights; {listed(masked)} are masked, and a mask "
            "needs its dense weight. Call parasparse.squash first."
        )


def _planned(plan: SavedPlan, originals: Mapping[str, Tensor]) -> list[Accelerated]:
    rows = []
    for name, original in originals.items():
        choices = [(int(n), f) for n, f in plan[name]]
        names = [f for _, f in choices if f is not None]
        missing = [f for f in names if f not in formats_of(original.detach(), names)]
        if missing:
            raise ValueError(
                f"`formats` must plan formats that can hold their weights; {missing[0]!r} cannot "
                f'hold "{name}" of shape {tuple(original.shape)}. Measure anew.'
            )
        rows += [_row(name, original, n, f, None, None) for n, f in choices]
    return rows


def _measured(
    model: nn.Module,
    inputs: Any,
    targets: Mapping[str, Target],
    originals: Mapping[str, Tensor],
    names: list[str],
) -> tuple[list[Accelerated], set[str]]:
    """Return what is the fastest, and the weights that are read other than by multiplying."""
    probes = {name: SparseWeight(original) for name, original in originals.items()}
    if inputs is None:
        uses = {
            n: measure.guessed_uses(o) if _is_linear(targets[n]) else []
            for n, o in originals.items()
        }
        recording = measure.Recording(uses)
    else:
        with installed(targets, probes):
            recording = measure.recorded(model, probes, inputs)
    found = measure.measured(originals, recording.uses, names)
    rows = [
        _row(name, originals[name], m.rows, m.format, m.dense_ms, m.chosen_ms)
        for name, every in found.items()
        for m in every
    ]
    if not rows:
        raise ValueError(
            "`example_inputs` must be given: without them only linear layers can be measured, and "
            "the sparse weights of `model` are in others."
            if inputs is None
            else "`model` must multiply with its sparse weights; on these inputs it does not."
        )
    if inputs is not None:
        lost = _losers(model, inputs, recording, targets, _weights(rows, originals, originals))
        rows = [
            replace(row, format=None, chosen_ms=row.dense_ms) if row.name in lost else row
            for row in rows
        ]
    read = {n for n, uses in recording.uses.items() if any(not use or not use.rows for use in uses)}
    return rows, read


def _losers(
    model: nn.Module,
    inputs: Any,
    recording: measure.Recording,
    targets: Mapping[str, Target],
    weights: Mapping[str, SparseWeight],
) -> set[str]:
    """Return the weights that cost their module, or the model, more than they save it."""
    lost: set[str] = set()
    calls = [(m, partial(m, *args, **kwargs)) for m, (args, kwargs) in recording.fused.items()]
    for module, call in [*calls, (model, partial(measure.called, model, inputs))]:
        inside = set(module.modules())
        own = {
            name: weight
            for name, weight in weights.items()
            if name not in lost and any(site.module in inside for site in targets[name].sites)
        }
        with measure.evaluating(model):
            if own and not measure.gains(call, partial(installed, targets, own)):
                lost |= own.keys()
    return lost


def _weights(
    rows: list[Accelerated], originals: Mapping[str, Tensor], kept: Collection[str]
) -> dict[str, SparseWeight]:
    """Return the weights for which any format was chosen."""
    choices: dict[str, Choices] = {}
    for row in rows:
        choices[row.name] = (*choices.get(row.name, ()), (row.rows, row.format))
    return {
        name: SparseWeight(originals[name], every, keep_dense=name in kept)
        for name, every in choices.items()
        if any(format_ is not None for _, format_ in every)
    }


def _is_linear(target: Target) -> bool:
    return target.ndim == 2 and any(isinstance(s.module, _LIKE_LINEAR) for s in target.sites)


def _row(name: str, weight: Tensor, *measured: Any) -> Accelerated:
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    return Accelerated(name, tuple(weight.shape), sparsity, *measured)
