"""`plan_shrink` and `shrink`: remove the channels that masks have made unnecessary."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from parasparse.attach.undo import restored_on_error
from parasparse.optim import Optimizers, each_optimizer
from parasparse.shrink.cached_results import drop_cached_results
from parasparse.shrink.comparing import Reference
from parasparse.shrink.cutting import check_fits, cut
from parasparse.shrink.plan import Shrinkage
from parasparse.shrink.planning import Work, work_for
from parasparse.shrink.refusals import check_has_values, check_shrinkable
from parasparse.shrink.undo import Undo
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import tensors_of
from parasparse.verbs.squash import squash


def plan_shrink(
    model: nn.Module,
    example_inputs: Any,
    *,
    targets: Specs | None = None,
    exact: bool = True,
    multiple_of: int = 1,
) -> Shrinkage:
    """Return what `shrink` would do, and change nothing. See `shrink` for arguments and errors."""
    return _planned(
        model, example_inputs, targets=targets, exact=exact, multiple_of=multiple_of
    ).plan


@torch.inference_mode(False)  # in which no Parameter can be made that learns again
def shrink(
    model: nn.Module,
    example_inputs: Any,
    *,
    targets: Specs | None = None,
    exact: bool = True,
    multiple_of: int = 1,
    optimizer: Optimizers | None = None,
    check: bool = True,
) -> nn.Module:
    """Remove the channels that masks have made unnecessary; return the model.

    A channel goes if nothing that stays depends on it: its values are 0 whatever the input is, or
    constants that can be added to a bias, or nothing reads them. What belongs to it in other
    tensors goes with it: its bias and norm, the inputs of the layers that read it, whole attention
    heads. The smaller network computes what the masked one did, up to rounding. An RMSNorm averages
    over fewer channels then, so its weight and eps are rescaled. Classes, names and order of the
    `state_dict`, Parameter objects, ties and `requires_grad` stay. Masks that drop more than whole
    channels are cut and stay; those that have nothing left to drop are removed. In a model without
    masks, entries that are 0 count as dropped.

    Args:
        model: masked or squashed, in any mode; it is run in eval mode, as a copy. Changed in place.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; or a
            `Shrinkage`, to cut a model of the same shapes by its plan.
        targets: the tensors that may lose channels, one left side of a rule or a list of them;
            None: all. A channel stays if it is part of a weight that no target reaches, also as
            an input. Biases, norms and buffers need no target.
        exact: if False, channels over which a norm or mean is taken are removed as well. The
            result differs; `plan.inexact` names the modules.
        multiple_of: sizes that become smaller stay a multiple of this number; the inputs of a
            grouped convolution are those of all its groups.
        optimizer: one, or a list of them; its state is cut too. Moments of rescaled weights keep
            their values.
        check: whether to run the masked and the smaller network on `example_inputs`, as copies in
            float64. If they differ by more than rounding, the model is put back. With
            `exact=False`, it only checks that the smaller one runs. With a plan, nothing runs.

    Raises:
        TypeError: `model` is not a module; or a state of `optimizer` does not have its parameter's
            shape.
        ValueError: nothing can be removed; the message says why. A target reaches nothing. The
            model lacks a tensor of the plan or has it in another shape, or other arguments than
            `optimizer` are passed beside a plan. `optimizer` is of another model.
        RuntimeError: the two networks differ; the message names the first module that does. A mask
            is not set or not bool. The model is wrapped (DDP, FSDP, torch.compile), accelerated,
            quantized, without values, or has other parametrizations than masks.

    Examples:
        >>> import torch, parasparse as ps
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = ps.sparsify(model, {"0": ps.Prune(0.5, pattern=ps.patterns.channel(0))})
        >>> [m.out_features for m in ps.shrink(model, torch.ones(1, 4))[::2]]
        [4, 2]
    """
    if optimizer is not None:
        each_optimizer(optimizer)
    if isinstance(example_inputs, Shrinkage):
        _check_alone(targets=targets, exact=exact, multiple_of=multiple_of)
        check_shrinkable(model)
        work, check = Work(example_inputs), False
    else:
        work = _planned(
            model, example_inputs, targets=targets, exact=exact, multiple_of=multiple_of
        )
        if not work.plan.rows:
            raise ValueError(f"nothing can be removed. {_why(model, work.plan)}")
    check_fits(model, work.plan, optimizer)
    reference = Reference(model, example_inputs) if check else None
    undo = Undo()
    try:
        cut(model, work.plan, work.constants, optimizer, undo)
        drop_cached_results(model)
        if reference is not None:
            rescaled = sum(row.scale != 1 for row in work.plan.rows)
            epsilons = [a.new for a in work.plan.attributes if isinstance(a.new, float)]
            reference.check(
                model, equal=not work.plan.inexact, rescaled=rescaled, epsilons=epsilons
            )
        _fold_whole_masks(model)
    except BaseException:
        undo.run()
        raise
    return model


def _check_alone(**arguments: Any) -> None:
    """Raise ValueError if an argument that decides what goes is passed beside a plan."""
    defaults = {"targets": None, "exact": True, "multiple_of": 1}
    for name, value in arguments.items():
        if value != defaults[name]:
            raise ValueError(
                f"`{name}` must be left out with a plan, which says what goes; got {value!r:.60}. "
                "Pass it to `plan_shrink`."
            )


def _planned(
    model: nn.Module, example_inputs: Any, *, targets: Specs | None, exact: bool, multiple_of: int
) -> Work:
    tensors = check_shrinkable(model)
    check_has_values(tensors)
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"`multiple_of` must be an int of at least 1; got {multiple_of!r}.")
    if isinstance(example_inputs, Shrinkage):
        raise TypeError("`example_inputs` must be inputs; got a plan, which only `shrink` takes.")
    return work_for(
        model, tensors, example_inputs, targets=targets, exact=exact, multiple_of=multiple_of
    )


def _why(model: nn.Module, plan: Shrinkage) -> str:
    """Return why dead channels stay, in a few lines."""
    matrices = {t.name for t in tensors_of(model, pairs=False) if len(t.shape) > 1}
    kept = [row for row in plan.kept_back if row.name in matrices]
    if not kept:
        return (
            "No mask drops a whole channel of a weight, and in a model without masks, no channel "
            "is 0. Choose channels with `coupled`, or with `patterns.channel`."
        )
    lines = [f"  {row}" for row in kept[:6]]
    more = len(kept) - len(lines)
    lines += [f"  and {more} more: see `plan_shrink(...).kept_back`"] if more else []
    return "\n".join(["Dead channels stay; `coupled` finds channels that can go:", *lines])


def _fold_whole_masks(model: nn.Module) -> None:
    """Remove the masks that keep everything now."""
    whole = [
        target for target in masked_targets(model)
        if target.has_bool_mask and bool(target.mask().all())  # type: ignore[union-attr]
    ]  # fmt: skip
    if whole:
        with restored_on_error(site.module for target in whole for site in target.sites):
            squash(model, [target.name for target in whole])
