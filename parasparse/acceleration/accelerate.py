"""Zeros into time: masked or squashed weights that multiply sparsely."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.acceleration.choose import choose_formats, weights_of
from parasparse.acceleration.formats.regular import Channels
from parasparse.acceleration.installing import is_plain, put, stored_or_masked, take, weights_in
from parasparse.acceleration.plans import SavedChoices, checked_names, checked_plan, planned
from parasparse.acceleration.table import Acceleration
from parasparse.acceleration.weight.sparse_weight import ON_CPU
from parasparse.attach.stand_in import is_accelerated
from parasparse.sharding.dtensors import is_dtensor
from parasparse.targets.tensors import Target, masked_tensors_of
from parasparse.text import listed, nearest

_ATTRIBUTE = "_acceleration"


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    formats: str | Collection[str] | SavedChoices | None = None,
    keep_dense: bool = True,
) -> nn.Module:
    """Let the zeros of `model` save time: its weights multiply sparsely; return the model.

    Linear, Conv1d to Conv3d, MultiheadAttention, RNN, LSTM and GRU keep their classes and their
    `state_dict`; a tensor subclass takes the place of each weight that gains. Which of the formats
    is the fastest, or whether the dense kernel is, is measured for each weight and number of rows:
    see `accelerated`. For inference alone. Changes in place are followed; those through `.data` are
    not, and `sparsify`, `squash` and other verbs on masks ask for `restore` first.

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
        RuntimeError: the model is accelerated already; a mask is not set; processes share weights.

    Examples:
        >>> from parasparse import sparsify
        >>> model = sparsify(nn.Linear(64, 64), 0.95)
        >>> accelerated(accelerate(model, formats={"weight": [(1, "bag")]})).plan
        {'weight': [(1, 'bag')]}
    """
    if is_accelerated(model):
        raise RuntimeError(
            "`model` must not be accelerated already. Call parasparse.restore(model) first."
        )
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            "`model` must hold its weights whole; processes share these. Gather them with "
            "`get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))` into "
            "a dense model."
        )
    plan = checked_plan(formats)
    names = checked_names(formats if plan is None else plan)
    targets = _candidates(model, plan)
    if not keep_dense:
        _check_freeable(targets)
    with torch.inference_mode(False), torch.no_grad():
        return _accelerated(model, example_inputs, targets, plan, names, keep_dense=keep_dense)


def _accelerated(
    model: nn.Module,
    example_inputs: Any,
    targets: Mapping[str, Target],
    plan: SavedChoices | None,
    names: list[str],
    *,
    keep_dense: bool,
) -> nn.Module:
    originals = {name: stored_or_masked(target) for name, target in targets.items()}
    if plan is not None:
        rows, read = planned(plan, originals), set[str]()
    else:
        rows, read = choose_formats(model, example_inputs, targets, originals, names)
    kept = originals.keys() if keep_dense else {r.name for r in rows if r.format is None} | read
    for name, weight in weights_of(rows, originals, kept).items():
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

    Weights that have been replaced since are left out.

    Examples:
        >>> accelerated(nn.Linear(2, 2)).plan
        {}
    """
    rows: Acceleration = model.__dict__.get(_ATTRIBUTE, Acceleration())
    there = {site for site, _ in weights_in(model)}
    now = {
        target.name
        for target in masked_tensors_of(model, pairs=False)
        if there.intersection(target.sites)
    }
    sparse = {row.name for row in rows if row.format is not None}
    return Acceleration(row for row in rows if row.name in now or row.name not in sparse)


def _candidates(model: nn.Module, plan: SavedChoices | None) -> dict[str, Target]:
    """Return the weights that may gain, by name; under a plan those that it names."""
    weights = {
        target.name: target
        for target in masked_tensors_of(model, pairs=False)
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
