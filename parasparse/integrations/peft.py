"""Adapters of PEFT on a masked base model."""

from typing import Any

import torch
from torch import nn

from parasparse.masks.mask import Mask
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed
from parasparse.verbs.sparsify import sparsify
from parasparse.verbs.squash import squash


def merge_and_unload(model: Any, **options: Any) -> nn.Module:
    """Merge the adapters of `model` into its base model, whose masks hold; return the base model.

    PEFT writes `weight.data` of the layers that it adapts. That of a masked layer is computed at
    each reading, so that PEFT's own merge changes nothing there, without a word. Here the masks are
    folded in, PEFT merges, and the masks come on again: w' = mask * (mask * w + scaling * B A).

    What the adapters add at masked entries is lost, so that outputs change by that much: evaluate
    after merging. Dropped entries hold no earlier values afterwards: they are 0 or what was added.

    Args:
        model: a `peft.PeftModel` whose base model has masks that are set; is changed.
        options: for its `merge_and_unload`, such as `adapter_names`.

    Raises:
        ValueError: there are no masks, or some are not set, real-valued or learned.

    Reference: Hu et al., "LoRA", 2021, arXiv:2106.09685, section 4.1.
    """
    targets = masked_targets(model)
    others = [target.name for target in targets if not _is_bool(target)]
    if others or not targets:
        which = f"those of {listed(others)} are not" if others else "it has none"
        raise ValueError(
            f"the masks of `model` must be set, and bool; {which}. `binarize` makes learned and "
            "real-valued ones bool."
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        model.unmerge_adapter()  # else PEFT skips them, though nothing came of it where masks are
    tensors = [_Kept(target) for target in targets]
    squash(model)
    base = model
    try:
        base = model.merge_and_unload(**options)
    except BaseException:
        for kept in tensors:
            kept.put_back()
        raise
    finally:
        masks = {kept.place: kept.mask for kept in tensors}  # modules and names in them stay
        found = {t.name: masks.get(_place(t)) for t in tensors_of(base)}
        sparsify(base, {name: mask for name, mask in found.items() if mask is not None})
    return base  # type: ignore[no-any-return]


class _Kept:
    """What a masked tensor was before it was squashed."""

    def __init__(self, target: Target) -> None:
        self.place, self.mask = _place(target), torch.clone(target.mask())  # type: ignore[arg-type]
        self._parts = [(site, site.stored().detach().clone()) for site in target.firsts]
        self._effective = target.effective().clone()
        self._target = target

    @torch.no_grad()
    def put_back(self) -> None:
        """Store again what was stored, unless something was merged into it."""
        if torch.equal(self._target.stored(), self._effective):
            for site, stored in self._parts:
                site.stored().copy_(stored)


def _place(target: Target) -> tuple[int, str]:
    site = target.firsts[0]
    return id(site.module), site.attr


def _is_bool(target: Target) -> bool:
    module = target.masks()[0]
    return isinstance(module, Mask) and module.mask is not None and module.mask.dtype == torch.bool
