"""`binarize`: make soft masks hard."""

import math

import torch
from torch import Tensor, nn

from parasparse.attach.stand_in import check_not_accelerated
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
    work = [target for target in masked_targets(model, targets) if not _is_bool(target)]
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
    values = [site.effective() for site in target.firsts]  # each may depend on both
    for site, value in zip(target.firsts, values, strict=True):
        original = site.stack().original
        kept = original * laid_out_like(scale, original) if isinstance(scale, Tensor) else value
        subtracts = isinstance(mask, SoftMask) and scale is None  # places elsewhere read it plainly
        kept_there = laid_out_like(keep, original)
        original.copy_(value if subtracts else torch.where(kept_there, kept, original))
    hard = mask.mask_(keep) if isinstance(mask, Mask) else Mask(values[0], keep)
    for site in target.sites:
        site.stack().replace_mask(hard)
    if isinstance(mask, SoftMask):
        mask.fold_(keep)  # as in `squash`
