"""Adapters of PEFT on a masked base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parasparse._checks import listed
from parasparse._tensors import collect
from parasparse.parametrizations import Mask
from parasparse.targets import masked
from parasparse.transforms import sparsify, squash


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
        ValueError: there are no masks, or some are learned: `binarize` first.
        RuntimeError: a mask is not set.

    Reference: Hu et al., "LoRA", 2021, arXiv:2106.09685, section 4.1.
    """
    targets = masked(model)
    masks: dict[tuple[int, str], Tensor] = {}  # by module and name in it, which stay
    others = []
    for target in targets:
        module = target.masks()[0]
        if not isinstance(module, Mask):
            others.append(target.name)
        elif module.mask is not None:
            site = target.parts[0][0]
            masks[id(site.module), site.attr] = torch.clone(module.mask)
    if others or not targets:
        raise ValueError(
            "the masks of `model` must be plain ones; "
            f"{listed(others) + ' are learned: `binarize` first' if others else 'it has none'}."
        )
    squash(model)
    base = model
    try:
        base = model.merge_and_unload(**options)
    finally:
        rules = {
            target.name: masks[id(site.module), site.attr]
            for target in collect(base)
            for site in target.sites[:1]
            if (id(site.module), site.attr) in masks
        }
        sparsify(base, rules)
    return base  # type: ignore[no-any-return]
