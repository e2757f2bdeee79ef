"""Masks of a model by name: list them, read them, sum up their penalties."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.attach import reading
from parasparse.masks.soft_mask import SoftMask
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed, nearest


def named_masks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """Yield the plain parameter name and the mask of each masked tensor of `model`.

    In the order of `named_modules`; a mask that several tensors share comes once. An unset mask is
    None; that of a `Gate` is what multiplies the weight now, that of a module of your own what is
    not 0 now.

    Args:
        model: any module.
        prefix: put before each name, with a dot.

    Examples:
        >>> from parasparse import sparsify
        >>> model = sparsify(nn.Linear(10, 10), 0.9)
        >>> [(name, int(mask.sum())) for name, mask in named_masks(model)]
        [('weight', 10)]
    """
    for target in masked_targets(model):
        yield (f"{prefix}.{target.name}" if prefix else target.name), target.mask()


def is_sparse(model: nn.Module) -> bool:
    """Whether any tensor of `model` carries a mask.

    Examples:
        >>> is_sparse(nn.Linear(2, 2))
        False
    """
    return bool(reading.all_masked_stacks(model))


def penalty(model: nn.Module, targets: Specs | None = None) -> Tensor:
    """Return the sum of the penalties of the gates of `model`, a scalar with its graph.

    Add it to the loss, times a lambda: each gate's `penalty` of the weight that it gets. Your own
    module that masks counts if it has a `penalty`.

    Args:
        model: with masks of `Gate`.
        targets: which masked tensors, as the left sides of rules: one, or a list; None: all.

    Raises:
        ValueError: there is no gate among them.

    Examples:
        >>> from parasparse import Gate, sparsify
        >>> penalty(sparsify(nn.Linear(3, 2), Gate())).item()
        6.0
    """
    if targets is None:  # torch.compile can follow this one
        stacks = reading.all_masked_stacks(model)
    else:
        stacks = [
            site.stack() for target in masked_targets(model, targets) for site in target.sites
        ]
    sums, seen = [], set()
    for stack in stacks:
        gate: Any = stack.mask
        if hasattr(gate, "penalty") and gate not in seen:  # ties and pairs share one
            seen.add(gate)
            # Reading what lies under a mask may change it: spectral_norm iterates.
            alone = isinstance(gate, SoftMask) and gate.is_product
            sums.append(gate.penalty(gate.logits if alone else stack.received()))
    if not sums:
        raise ValueError("`model` must have gates; none of its masked tensors has one.")
    return torch.stack(sums).sum()


def mask_of(model: nn.Module, name: str) -> Tensor | None:
    """Return the mask of tensor `name`, the live one; None if it is not set.

    Raises:
        ValueError: no masked tensor has this name.

    Examples:
        >>> from parasparse import sparsify
        >>> mask_of(sparsify(nn.Linear(2, 2), 0.5), "weight").sum().item()
        2
    """
    return _find(masked_targets(model), name, "masked tensor").mask()


def stored(model: nn.Module, name: str) -> Tensor:
    """Return tensor `name` without its mask: a Parameter, or what other parametrizations compute.

    A pair gives a complex tensor, detached.

    Raises:
        ValueError: no tensor has this name.

    Examples:
        >>> from parasparse import sparsify
        >>> int((stored(sparsify(nn.Linear(2, 2), 0.5), "weight") != 0).sum())
        4
    """
    target = _find([*masked_targets(model), *tensors_of(model)], name, "tensor")
    if target.is_pair:
        parts = {site.attr: site for site in target.firsts}
        joint = target.name.rpartition(".")[2]
        own = [s for attr, s in parts.items() if name.endswith(attr) and attr != joint]
        if not own or name == target.name:
            return target.stored()
        return own[0].stored()
    return target.firsts[0].stored()


def _find(targets: list[Target], name: str, what: str) -> Target:
    for target in targets:
        if name in target.names:
            return target
    names = list(dict.fromkeys(n for target in targets for n in target.names))
    inside = [n for n in names if n.startswith(f"{name}.")]
    near = f" (in it: {listed(inside)})" if inside else nearest(name, names)
    raise ValueError(f'`name` must be that of a {what}; got "{name}"{near}.')
