"""Warnings of what rules do that nobody may have meant; `stacklevel` as in `warnings.warn`."""

import warnings

from torch import Tensor

from parasparse.masks.kept_entries import KeptEntries
from parasparse.masks.mask import Mask
from parasparse.rules.assignments import Assignment, Assignments
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment
from parasparse.sharding.dtensors import count_nonzero
from parasparse.targets.left_dense import unexpectedly_dense
from parasparse.text import listed


def warn_left_dense(assigned: Assignments, *, stacklevel: int) -> None:
    """Warn of large tensors that a treatment alone, without a target, does not reach."""
    if assigned and all(each.rule is None for each in assigned):
        missed = unexpectedly_dense(assigned.targets)
        if missed:
            warnings.warn(
                f"a sparsity alone leaves {listed(missed)} dense, a tenth of the weights or more. "
                "Write rules that name them, with a sparsity or None.",
                stacklevel=stacklevel + 1,
            )


def warn_emptied(assigned: Assignments, *, stacklevel: int) -> None:
    """Warn of tensors that a sparsity below 1 makes all zeros, and that were not so before."""
    emptied = [each.target.name for each in assigned if _is_emptied(each)]
    if emptied:
        warnings.warn(
            f"no entry is left of {listed(emptied)}: these weights are all zeros now. To keep some "
            "entries of each tensor, give the rule a `max_sparsity`, as in `Prune(0.9, "
            'scope="global", max_sparsity=0.99)`; to leave these tensors dense, give them None.',
            stacklevel=stacklevel + 1,
        )


def _is_emptied(each: Assignment) -> bool:
    treatment = as_treatment(each.treatment)
    share = treatment.sparsity if isinstance(treatment, Prune) else None
    return share is not None and share < 1 and _is_empty(each.result) and not _was_empty(each)


def _was_empty(each: Assignment) -> bool:
    kept = each.target.kept()
    masks = [mask.mask for mask in each.target.masks() if isinstance(mask, Mask)]
    return any(_is_empty(mask) for mask in (*masks, kept))


def _is_empty(mask: object) -> bool:
    if isinstance(mask, KeptEntries):
        return not len(mask)
    if not isinstance(mask, Tensor) or mask.is_meta:
        return False
    return mask.numel() > 0 and not count_nonzero(mask)
