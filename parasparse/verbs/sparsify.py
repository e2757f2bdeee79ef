"""`sparsify`: attach masks by rules."""

from __future__ import annotations

from typing import Any

from torch import nn

from parasparse.attach import attaching, reading
from parasparse.attach.pair_stack import join
from parasparse.attach.undo import restored_on_error
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.rules.assignments import Step, resolve
from parasparse.sharding.fsdp import follow


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


def _attached(step: Step) -> nn.Module:
    """Return what masks the tensor of `step`, hung at all its places."""
    mask: nn.Module
    if isinstance(step.result, nn.Module):
        mask = step.result
    else:
        site = step.target.parts[0][0]
        mask = step.reuse or Mask(reading.stored(site.module, site.attr))
    for site in step.target.sites:
        if reading.mask_module(site.module, site.attr) is None:
            attaching.attach(site.module, site.attr, mask)
        else:
            site.stack().replace_mask(mask)
    if len(step.target.parts) > 1 and isinstance(mask, SoftMask):
        # A part may be tied where the other is not: values are those of the first places.
        real, imaginary = (part[0].stack() for part in step.target.parts)
        for index, part in enumerate(step.target.parts):
            join([site.stack() for site in part], index, real, imaginary)
    return mask
