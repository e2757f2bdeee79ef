"""`sparsify`: attach masks by rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from parasparse.attach import attaching
from parasparse.attach.pair_stack import join
from parasparse.attach.undo import restored_on_error
from parasparse.masks.kept_entries import KeptEntries
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.rules.assignments import Assignment, assignments
from parasparse.rules.types import Rules
from parasparse.rules.warn import warn_emptied, warn_left_dense
from parasparse.sharding.fsdp import follow
from parasparse.verbs.moving import check_movable, move
from parasparse.verbs.writable import check_writable


def sparsify(model: nn.Module, rules: Rules, *, pairs: bool = True) -> nn.Module:
    """Attach masks to the tensors of `model` that `rules` reach; return the model.

    Parameters stay the same objects, so existing optimizers, hooks and DDP wrappers keep working.
    If a tensor already has a mask, the new one replaces it and is chosen from the stored weights.

    Args:
        model: any module; changed in place.
        rules: `{target: treatment}`, where the first rule that reaches a tensor applies, or a
            single treatment for every weight. Target: name, glob, compiled regex, module type or
            tuple of types, predicate `(name, module, tensor) -> bool`. Treatment: a sparsity in
            [0, 1], "zeros", a mask, `Prune`, `Fixed`, `Gate`, None, or a callable
            `dict[name, Tensor] -> dict[name, mask or nn.Module]`. Rules under the name of a module
            may be nested, `{"conv": {"weight": mask}}`.
        pairs: give the real and the imaginary tensor of a module (`x_re`/`x_im`, `x_real`/`x_imag`,
            a ParameterDict with `real` and `imag`) one mask.

    Raises:
        TypeError, ValueError, RuntimeError: a rule cannot be applied. The model is unchanged.

    Warns:
        UserWarning: a sparsity below 1 leaves no entry of a tensor; or a treatment without a target
            may have missed a tenth of the weights.

    Examples:
        >>> model = sparsify(nn.Linear(10, 10), 0.9)
        >>> int((model.weight != 0).sum())
        10
    """
    assigned = assignments(model, rules, pairs=pairs)
    warn_left_dense(assigned, stacklevel=2)
    warn_emptied(assigned, stacklevel=2)
    apply(model, assigned)
    return model


def apply(model: nn.Module, assigned: list[Assignment], optimizer: Any = None) -> None:
    """Attach the masks of `assigned` to `model`: all of them, or none if one fails.

    Then write their new weights.

    Compact weights keep the entries of `assigned`, and the state of `optimizer` follows them.
    """
    moves = [
        (each.target, each.result) for each in assigned if isinstance(each.result, KeptEntries)
    ]
    for target, _ in moves:
        check_movable(target, optimizer)
    assigned = [each for each in assigned if not isinstance(each.result, KeptEntries)]
    for each in assigned:
        if each.weights is not None:
            check_writable(each.target, "sparsify")
    with restored_on_error(site.module for each in assigned for site in each.target.sites):
        masks = [_attached(each) for each in assigned]
    for each, mask in zip(assigned, masks, strict=True):
        if isinstance(mask, Mask) and not isinstance(each.result, nn.Module):
            mask.mask_(each.result, copy=False)
            # These were set by a controller, which has now lost its masks.
            mask.dense_gradient, mask.zeroed_in_place = False, frozenset()
        if each.weights is not None:
            with torch.no_grad():
                each.target.originals()[0].copy_(each.weights)
    for target, entries in moves:
        move(target, entries, optimizer)
    follow(model)


def _attached(each: Assignment) -> nn.Module:
    """Attach one mask module to a tensor wherever it is used; return the module."""
    mask: nn.Module
    assert not isinstance(each.result, KeptEntries)
    if isinstance(each.result, nn.Module):
        mask = each.result
    else:
        mask = each.reuse or Mask(each.target.firsts[0].stored())
    for site in each.target.sites:
        if site.mask_module() is None:
            attaching.attach(site.module, site.attr, mask)
        else:
            site.stack().replace_mask(mask)
    if each.target.is_pair and isinstance(mask, SoftMask):
        # One component may be tied and the other not. The first use of each has the values.
        real, imaginary = (first.stack() for first in each.target.firsts)
        for index, component in enumerate(each.target.components):
            join([site.stack() for site in component], index, real, imaginary)
    return mask
