"""`binarize`: make soft masks hard."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from parasparse.attach.accelerated import check_not_accelerated
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.sharding.dtensors import laid_out_like
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Target
from parasparse.verbs.writable import check_writable


def binarize(
    model: nn.Module, targets: Specs | None = None, *, threshold: float | None = None
) -> nn.Module:
    """Make soft and real masks bool and fold their scale into the weights; return the model.

    An entry is kept if its mask is not 0. With a `Gate`, it is kept if its logit (`sigmoid`), mask
    (`hard_concrete`) or score (`straight_through`) is above `threshold`, or its log alpha is at
    most `threshold` (`variational_dropout`). Dropped entries keep their stored values, except with
    `soft_threshold`, where these become 0.

    Args:
        model: any module; changed in place. Bool masks do not change.
        targets: masked tensors, one target of a rule or a list of them; None: all.
        threshold: finite, for a `Gate`; None: 0, for `straight_through` its sparsity, for
            `variational_dropout` 3.

    Raises:
        ValueError: a target reaches no masked tensor, the threshold is not finite, or a mask that
            is not bool lies over another parametrization, such as weight_norm.
        RuntimeError: a mask is not set, or a weight is not writable.

    Examples:
        >>> model = sparsify(nn.Linear(2, 1), {"weight": [[0.5, 0.0]]})
        >>> binarize(model).parametrizations.weight[0].mask.tolist()
        [[True, False]]
    """
    check_not_accelerated(model)
    reshard(model)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"`threshold` must be a finite number; got {threshold!r}.")
    work = [target for target in masked_targets(model, targets) if not target.has_bool_mask]
    for target in work:
        target.effective()  # an unset mask raises here
        if any(len(site.stack()) > 1 for site in target.sites):
            raise ValueError(
                f'"{target.name}" has another parametrization under its mask, so the scale of the '
                "mask cannot be folded into it. Call `squash` instead."
            )
        check_writable(target, "binarize")
    with torch.no_grad():
        for target in work:
            _harden(target, threshold)
    return model


def _harden(target: Target, threshold: float | None) -> None:
    """Replace the mask of `target` by a bool one and fold its scale into the stored weights."""
    mask = target.masks()[0]
    scale = getattr(mask, "mask", None)
    if isinstance(mask, SoftMask):
        scale = mask.hardened(target.stored(), threshold)
    # A mask that does not multiply is known only by its present result.
    keep = scale != 0 if isinstance(scale, Tensor) else target.effective() != 0
    values = [
        site.effective() for site in target.firsts
    ]  # before any write: each may depend on both
    for site, value in zip(target.firsts, values, strict=True):
        original = site.stack().original
        kept = original * laid_out_like(scale, original) if isinstance(scale, Tensor) else value
        subtracts = isinstance(mask, SoftMask) and scale is None  # other uses read it plainly
        kept_there = laid_out_like(keep, original)
        original.copy_(value if subtracts else torch.where(kept_there, kept, original))
    hard = mask.mask_(keep) if isinstance(mask, Mask) else Mask(values[0], keep)
    for site in target.sites:
        site.stack().replace_mask(hard)
    if isinstance(mask, SoftMask):
        mask.fold_(keep)  # as in `squash`
