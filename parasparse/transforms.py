"""The verbs on models: attach masks by rules, fold them into weights, make soft ones hard."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parasparse import _attach
from parasparse._foldable import check_foldable, check_writable
from parasparse._fsdp import follow, is_sharded, reshard
from parasparse._pair_stack import join
from parasparse._parts import number, spread_like
from parasparse._resolve import Step, resolve
from parasparse._snapshot import restored_on_error
from parasparse._stand_in import check_not_accelerated
from parasparse._tables import Plan, PlanRow, described
from parasparse._tensors import Site, Target
from parasparse.parametrizations import Mask
from parasparse.soft_mask import SoftMask
from parasparse.targets import masked


def sparsify(model: nn.Module, rules: Any, *, pairs: bool = True) -> nn.Module:
    """Attach masks to the tensors of `model` that `rules` reach; return the model.

    Parameters stay the objects they were: optimizers, hooks and DDP wrappers made before go on
    working. A tensor that has a mask gets the new one instead, ranked by the stored weights.

    Args:
        model: any module; changed in place.
        rules: `{target: treatment}`, the first rule that reaches a tensor has it; or a treatment
            alone, for every weight. Target: name, glob, compiled regex, module type or tuple of
            types, predicate `(name, module, tensor) -> bool`. Treatment: a sparsity in [0, 1],
            "zeros", a mask, `Prune`, `Fixed`, `Gate`, None, or a callable
            `dict[name, Tensor] -> dict[name, mask or nn.Module]`.
        pairs: a real and an imaginary tensor of one module (`x_re`/`x_im`, `x_real`/`x_imag`, a
            ParameterDict with `real` and `imag`) share one mask.

    Raises:
        TypeError, ValueError, RuntimeError: a rule cannot be followed. The model is as it was.

    Examples:
        >>> model = sparsify(nn.Linear(10, 10), 0.9)
        >>> int((model.weight != 0).sum())
        10
    """
    attach(model, resolve(model, rules, pairs=pairs))
    return model


def attach(model: nn.Module, steps: list[Step]) -> None:
    """Do to `model` what `steps` say, all of them or none."""
    with restored_on_error(site.module for step in steps for site in step.target.sites):
        masks = [_attached(step) for step in steps]
    for step, mask in zip(steps, masks, strict=True):
        if isinstance(mask, Mask) and not isinstance(step.result, nn.Module):
            mask.mask_(step.result, copy=False)
            # A controller that wanted these has lost its masks.
            mask.dense_gradient, mask.zeroed_in_place = False, frozenset()
    follow(model)


def plan(model: nn.Module, rules: Any, *, pairs: bool = True) -> Plan:
    """Return the table of what `sparsify(model, rules)` would do; change nothing.

    Args, Raises: as `sparsify`.

    Examples:
        >>> plan(nn.Linear(10, 10), 0.9)[0].kept
        10
    """
    rows = []
    for step in resolve(model, rules, pairs=pairs):
        known = isinstance(step.result, Tensor) and not step.result.is_meta
        kept = number(step.result) if known else None  # type: ignore[arg-type]
        rows.append(
            PlanRow(
                name=step.target.name,
                shape=tuple(step.target.stored().shape),
                rule="every weight" if step.rule is None else described(step.rule),
                treatment=described(step.treatment),
                kept=None if kept is None else kept * len(step.target.parts),
            )
        )
    return Plan(rows)


def squash(model: nn.Module, targets: Any = None) -> nn.Module:
    """Fold masks into plain weights and take them off; return the model.

    Afterwards classes, `state_dict` keys and the order of parameters are those of the dense model,
    and the Parameters are the objects they were. The exception: where other parametrizations lie
    under the mask, all of them are baked into one new Parameter.

    Args:
        model: any module; changed in place. One without masks stays as it is.
        targets: which masked tensors, as the left sides of rules: one, or a list; None: all.

    Raises:
        RuntimeError: a mask is not set; `fully_shard` manages the tensors that lie under one. The
            model is as it was.
        ValueError: a target reaches no masked tensor.

    Examples:
        >>> model = squash(sparsify(nn.Linear(10, 10), 0.9))
        >>> type(model) is nn.Linear, int((model.weight != 0).sum())
        (True, 10)
    """
    chosen = _to_take_off(model, targets)
    if is_sharded(model) and any(len(s.stack()) > 1 for target in chosen for s in target.sites):
        raise RuntimeError(
            "a tensor that is parametrized under its mask must be squashed before `fully_shard`, "
            "which manages what lies there. `dense_state_dict` gives its values."
        )
    for target in chosen:
        target.effective()  # an unset mask raises here, before anything has changed
    check_foldable(model, chosen)
    with restored_on_error(site.module for target in chosen for site in target.sites):
        for target in chosen:
            mask = target.masks()[0]
            values = [_values(part) for part in target.parts]  # both parts may go into each
            for part, baked in zip(target.parts, values, strict=True):
                _fold(part, baked)
            # A place outside the model that was given may share it: scale once only
            # (test_squashing_a_part_scales_a_tie_that_lies_outside_once).
            if isinstance(mask, Mask) and mask.mask is not None:
                mask.mask_(mask.mask != 0)
            elif isinstance(mask, SoftMask):
                mask.fold_()
    _moved(model)
    return model


def unsparsify(model: nn.Module, targets: Any = None) -> nn.Module:
    """Take masks off without folding them: the stored weights come back; return the model.

    Args, Raises: as `squash`, but a mask need not be set.

    Examples:
        >>> model = unsparsify(sparsify(nn.Linear(10, 10), 0.9))
        >>> int((model.weight != 0).sum())
        100
    """
    for target in _to_take_off(model, targets):
        for site in target.sites:
            _attach.detach(site.module, site.attr)
    _moved(model)
    return model


def binarize(model: nn.Module, targets: Any = None, *, threshold: float | None = None) -> nn.Module:
    """Make soft and real-valued masks bool, fold their scale into the weights; return the model.

    An entry is kept where its mask is not 0. Under a `Gate` it is kept where its logit (`sigmoid`),
    its mask (`hard_concrete`) or its score (`straight_through`) is above `threshold`, or its log
    alpha is at most that (`variational_dropout`). Dropped entries keep what they store, but under
    `soft_threshold`, where it becomes 0.

    Args:
        model: any module; changed in place. Bool masks stay as they are.
        targets: which masked tensors, as in `squash`.
        threshold: of a `Gate`, finite; None: what the hard gate has: 0, for `straight_through` its
            sparsity, for `variational_dropout` 3.

    Raises:
        ValueError: a target reaches no masked tensor; or another parametrization, such as
            weight_norm, lies under a mask that is not bool, so that its scale cannot be folded; the
            threshold is not finite.
        RuntimeError: a mask is not set; a weight cannot be written to.

    Examples:
        >>> model = sparsify(nn.Linear(2, 1), {"weight": [[0.5, 0.0]]})
        >>> binarize(model).parametrizations.weight[0].mask.tolist()
        [[True, False]]
    """
    check_not_accelerated(model)
    reshard(model)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"`threshold` must be a finite number; got {threshold!r}.")
    work = [target for target in masked(model, targets) if not _is_bool(target)]
    for target in work:
        target.effective()  # an unset mask raises here
        if any(len(site.stack()) > 1 for site in target.sites):
            raise ValueError(
                f"a mask that `binarize` makes bool must be the only parametrization; "
                f'"{target.name}" has others underneath. `squash` it instead.'
            )
        check_writable(target, "binarize")
    with torch.no_grad():
        for target in work:
            _harden(target, threshold)
    return model


def _attached(step: Step) -> nn.Module:
    """Return what masks the tensor of `step`, hung at all its places."""
    mask: nn.Module
    if isinstance(step.result, nn.Module):
        mask = step.result
    else:
        site = step.target.parts[0][0]
        mask = step.reuse or Mask(_attach.stored(site.module, site.attr))
    for site in step.target.sites:
        if _attach.mask_module(site.module, site.attr) is None:
            _attach.attach(site.module, site.attr, mask)
        else:
            site.stack().replace_mask(mask)
    if len(step.target.parts) > 1 and isinstance(mask, SoftMask):
        # A part may be tied where the other is not: values are those of the first places.
        real, imaginary = (part[0].stack() for part in step.target.parts)
        for index, part in enumerate(step.target.parts):
            join([site.stack() for site in part], index, real, imaginary)
    return mask


def _to_take_off(model: nn.Module, targets: Any) -> list[Target]:
    check_not_accelerated(model)
    reshard(model)
    return masked(model, targets)


@torch.no_grad()
def _values(part: tuple[Site, ...]) -> list[Tensor]:
    return [_attach.effective(site.module, site.attr) for site in part]


def _fold(part: tuple[Site, ...], values: list[Tensor]) -> None:
    """Make the masked values of one tensor, tied at the sites of `part`, its plain values."""
    baked: Tensor | None = None
    for site, value in zip(part, values, strict=True):
        stack = site.stack()
        if len(stack) == 1:
            with torch.no_grad():
                stack.original.copy_(value)
            _attach.detach(site.module, site.attr)
            continue
        if baked is None:
            tensors = _attach.originals(site.module, site.attr)
            grad = any(tensor.requires_grad for tensor in tensors)
            held = isinstance(tensors[0], nn.Parameter)
            baked = nn.Parameter(value, requires_grad=grad) if held else value
        _attach.detach(site.module, site.attr, baked)


def _is_bool(target: Target) -> bool:
    mask = target.masks()[0]
    return isinstance(mask, Mask) and mask.mask is not None and mask.mask.dtype == torch.bool


def _harden(target: Target, threshold: float | None) -> None:
    """Give `target` a bool mask, with the scale of the mask it had in the stored values."""
    mask = target.masks()[0]
    scale = getattr(mask, "mask", None)
    if isinstance(mask, SoftMask):
        scale = mask.hardened(target.stored(), threshold)
    # Of what is no product, what it gives now is all that is known.
    keep = scale != 0 if isinstance(scale, Tensor) else target.effective() != 0
    values = [_values(part)[0] for part in target.parts]  # both parts may go into each
    for part, value in zip(target.parts, values, strict=True):
        original = part[0].stack().original
        kept = original * spread_like(scale, original) if isinstance(scale, Tensor) else value
        subtracts = isinstance(mask, SoftMask) and scale is None  # places elsewhere read it plainly
        kept_there = spread_like(keep, original)
        original.copy_(value if subtracts else torch.where(kept_there, kept, original))
    hard = mask.mask_(keep) if isinstance(mask, Mask) else Mask(values[0], keep)
    for site in target.sites:
        site.stack().replace_mask(hard)
    if isinstance(mask, SoftMask):
        mask.fold_(keep)  # as in `squash`


def _moved(model: nn.Module) -> None:
    """Tell `fully_shard` and DDP wrappers in `model` that Parameters and masks have moved.

    Else DDP broadcasts an empty list at the next forward (ddp_forward_after_squash).
    """
    follow(model)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module._assign_modules_buffers()
