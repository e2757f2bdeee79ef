"""PEFT adapters on a masked base model."""

from typing import Any

import torch
from torch import nn

from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed
from parasparse.verbs.sparsify import sparsify
from parasparse.verbs.squash import squash


def merge_and_unload(model: Any, **options: Any) -> nn.Module:
    """Merge the adapters of `model` into its masked base model, and return the base model.

    w' = mask * (mask * w + scaling * B A). PEFT's own merge writes to `weight.data`, which is
    computed at each read in a masked layer, so its change is silently lost.

    Outputs lose the adapters' change of masked entries: evaluate after merging. Masked entries then
    store only this change, not their earlier values.

    Args:
        model: a `peft.PeftModel` whose base model has bool masks; is changed in place.
        **options: arguments of its `merge_and_unload`, such as `adapter_names`.

    Raises:
        ValueError: there are no masks, or some are unset, real-valued or learned.

    Reference: Hu et al., "LoRA", 2021, arXiv:2106.09685, section 4.1.
    """
    targets = masked_targets(model)
    others = [target.name for target in targets if not target.has_bool_mask]
    if others or not targets:
        which = f"the masks of {listed(others)} are not" if others else "it has none"
        raise ValueError(
            f"`model` must have bool masks that are set; {which}. `binarize` turns learned and "
            "real-valued masks into bool ones."
        )
    if any(getattr(module, "merged_adapters", None) for module in model.modules()):
        model.unmerge_adapter()  # PEFT skips merged adapters, but masked layers have not changed
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
        masks = {kept.place: kept.mask for kept in tensors}  # merging keeps modules and attributes
        found = {t.name: masks.get(_place(t)) for t in tensors_of(base)}
        sparsify(base, {name: mask for name, mask in found.items() if mask is not None})
    return base  # type: ignore[no-any-return]


class _Kept:
    """A masked tensor before `squash`."""

    def __init__(self, target: Target) -> None:
        self.place, self.mask = _place(target), torch.clone(target.mask())  # type: ignore[arg-type]
        self._parts = [(site, site.stored().detach().clone()) for site in target.firsts]
        self._effective = target.effective().clone()
        self._target = target

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the stored values, unless an adapter was merged into them."""
        if torch.equal(self._target.stored(), self._effective):
            for site, stored in self._parts:
                site.stored().copy_(stored)


def _place(target: Target) -> tuple[int, str]:
    site = target.firsts[0]
    return id(site.module), site.attr
