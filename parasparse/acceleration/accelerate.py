"""`accelerate`: masked or squashed weights that multiply sparsely."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.acceleration.choose import choose_formats, weights_of
from parasparse.acceleration.formats.regular import Channels
from parasparse.acceleration.installing import (
    put,
    replaceable,
    stored_or_masked,
    take,
    weights_in,
)
from parasparse.acceleration.saved_choices import SavedChoices, checked_names, checked_plan, planned
from parasparse.acceleration.table import Acceleration
from parasparse.acceleration.weight.sparse_weight import ON_CPU
from parasparse.attach.accelerated import is_accelerated
from parasparse.attach.compacted import check_not_compact
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
    compile_kernel: bool = False,
) -> nn.Module:
    """Make the weights of `model` multiply sparsely where that is faster; return the model.

    Works on Linear, Conv1d to Conv3d, MultiheadAttention, RNN, LSTM and GRU. Classes and
    `state_dict` stay the same; a tensor subclass replaces each weight that gets faster. The formats
    and the dense kernel are timed for each weight and number of rows; `accelerated` shows the
    choices. An accelerated model is for inference only. In-place changes of a weight take effect,
    except through `.data`. Call `restore` before `sparsify`, `squash` or others that change masks.

    Args:
        model: a squashed or masked model; changed in place.
        example_inputs: inputs of the model: a tensor, a tuple or a dict. None: linear layers are
            measured at 1, 8 and 64 rows, and convolutions stay dense.
        formats: the formats to choose from, among "csr", "bag", "bsr", "channels", "2:4" and
            "compiled"; None: all but "compiled". Or the `plan` of an earlier `accelerated`; then
            nothing is measured.
        keep_dense: False frees the dense values of weights that multiply sparsely at each measured
            number of rows. `restore` then raises `RuntimeError`.
        compile_kernel: True also chooses from "compiled", a kernel in C++, which is compiled once
            and kept in torch's folder of extensions. Without a compiler, a warning says so, and
            the other formats are chosen from.

    Raises:
        ValueError: no weight is at least half zeros or has channels of zeros; a format, or a weight
            of the plan, is not known; masked weights with `keep_dense=False`.
        TypeError: such a weight on a CPU is not float32 or float64.
        RuntimeError: the model is accelerated already; a mask is not set; weights are compact or
            DTensors.

    Examples:
        >>> model = sparsify(nn.Linear(64, 64), 0.95)
        >>> accelerated(accelerate(model, formats={"weight": [(1, "bag")]})).plan
        {'weight': [(1, 'bag')]}
    """
    if is_accelerated(model):
        raise RuntimeError(
            "`model` must not be accelerated already. Call parasparse.restore(model) first."
        )
    check_not_compact(model, "`accelerate`", ", or parasparse.squash(model)")
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            "`model` must not be sharded over processes. Gather its weights into a dense model "
            "with `get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`."
        )
    plan = checked_plan(formats)
    names = checked_names(formats if plan is None else plan, compile_kernel=compile_kernel)
    targets = _candidates(model, plan)
    if not keep_dense:
        _check_freeable(targets)
    with torch.inference_mode(False), torch.no_grad():
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
    """Undo `accelerate`: put the Parameters or masks back; return the model.

    Args:
        model: changed in place. A model that is not accelerated does not change.

    Raises:
        RuntimeError: `keep_dense=False` freed dense values. The model is unchanged.

    Examples:
        >>> restore(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    found = list(weights_in(model))
    if any(weight.original is None for _, weight in found):
        raise RuntimeError(
            "`model` cannot be restored, because `accelerate(keep_dense=False)` freed its dense "
            "values. Load its `state_dict()`, which computes them, into a new model."
        )
    for site, weight in found:
        take(site, weight)
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
    return model


def accelerated(model: nn.Module) -> Acceleration:
    """Return a table of the format of each weight of `model` at each number of rows.

    Weights that were replaced after `accelerate` are left out.

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
    """Return the weights that may get faster, by name; with a plan only the weights in it."""
    every = masked_tensors_of(model, pairs=False)
    weights = {target.name: target for target in every if replaceable(target)}
    if plan is not None:
        unknown = [name for name in plan if name not in weights]
        if unknown:
            raise ValueError(
                f"the plan in `formats` names {listed(unknown)}, which the model does not have as "
                f"weights{nearest(unknown[0], weights)}."
            )
        weights = {name: weights[name] for name in plan}
    found = {name: t for name, t in weights.items() if _may_gain(t.effective())}
    if not found:
        raise ValueError(
            "`model` must have a weight of which at least half are zeros, or whole channels; it "
            f"has none among {len(weights)} weights. Call parasparse.sparsify first."
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
            f"`keep_dense=False` needs a model without masks; {listed(masked)} are masked, and a "
            "mask needs its dense weight. Call parasparse.squash first."
        )
