"""Read masks, stored tensors and penalties of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.attach import finding, reading
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed, nearest


def named_masks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """Yield the plain parameter name and the mask of each masked tensor of `model`.

    The order is that of `named_modules`. A mask shared by several tensors comes once. An unset mask
    is None. The mask of a `Gate` is its present factor of the weight; the mask of a custom module
    is True where its result is not 0.

    Args:
        model: any module.
        prefix: put before each name, with a dot.

    Examples:
        >>> model = sparsify(nn.Linear(10, 10), 0.9)
        >>> [(name, int(mask.sum())) for name, mask in named_masks(model)]
        [('weight', 10)]
    """
    for target in masked_targets(model):
        yield (f"{prefix}.{target.name}" if prefix else target.name), target.mask()


def is_sparse(model: nn.Module) -> bool:
    """Whether any tensor of `model` has a mask.

    Raises:
        ValueError: masks are part of an exported or traced program, where no verb reaches them.

    Examples:
        >>> is_sparse(nn.Linear(2, 2))
        False
    """
    return bool(finding.all_masked_stacks(model))


def penalty(model: nn.Module, targets: Specs | None = None) -> Tensor:
    """Return the sum of the penalties of the gates of `model`, a scalar with its graph.

    Multiply it by a coefficient and add it to the loss. Custom modules that mask are included if
    they have a method `penalty(weight)`.

    Args:
        model: a model with masks of `Gate`.
        targets: masked tensors, one target of a rule or a list of them; None: all.

    Raises:
        ValueError: the tensors have no gates, or a target reaches no masked tensor.

    Examples:
        >>> penalty(sparsify(nn.Linear(3, 2), Gate())).item()
        6.0
    """
    if targets is None:  # torch.compile can trace this branch
        stacks = finding.all_masked_stacks(model)
    else:
        stacks = [site.stack() for t in masked_targets(model, targets) for site in t.sites]
    sums, seen = [], set()
    for stack in stacks:
        gate: Any = stack.mask
        if hasattr(gate, "penalty") and gate not in seen:  # ties and pairs share one
            seen.add(gate)
            # Other parametrizations are only read if needed: spectral_norm changes when read.
            needs_no_weight = isinstance(gate, SoftMask) and gate.is_product
            sums.append(gate.penalty(gate.logits if needs_no_weight else stack.received()))
    if not sums:
        raise ValueError("`model` must have gates; its masked tensors have none.")
    return torch.stack(sums).sum()


def mask_of(model: nn.Module, name: str) -> Tensor | None:
    """Return the mask of tensor `name`, not a copy; None if it is not set.

    Raises:
        ValueError: no masked tensor has this name.

    Examples:
        >>> mask_of(sparsify(nn.Linear(2, 2), 0.5), "weight").sum().item()
        2
    """
    found = _at(model, name)
    mask = None if found is None else reading.mask_module(*found)
    if isinstance(mask, Mask):
        return mask.mask
    return _find(masked_targets(model), name, "masked tensor").mask()


def stored(model: nn.Module, name: str) -> Tensor:
    """Return tensor `name` without its mask: a Parameter, or the result of other parametrizations.

    A pair is returned as a detached complex tensor.

    Raises:
        ValueError: no tensor has this name.

    Examples:
        >>> int((stored(sparsify(nn.Linear(2, 2), 0.5), "weight") != 0).sum())
        4
    """
    found = _at(model, name)
    if found is not None:
        return reading.stored(*found)
    target = _find([*masked_targets(model), *tensors_of(model)], name, "tensor")
    if target.is_pair:
        parts = {site.attr: site for site in target.firsts}
        joint = target.name.rpartition(".")[2]
        own = [s for attr, s in parts.items() if name.endswith(attr) and attr != joint]
        return own[0].stored() if own and name != target.name else target.stored()
    return target.firsts[0].stored()


def _at(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the module and attribute of tensor `name`, if they are where its name says.

    They are not for the joint name of a pair, and for names without the prefixes of wrappers.
    """
    path, _, attr = name.rpartition(".")
    module: nn.Module | None = model
    for key in path.split(".") if path else ():
        if module is None or key not in module._modules:
            return None
        module = module._modules[key]
    if module is None:
        return None
    finding.take_over(module)
    if not any(attr in names for names in reading.tensor_names(module)):
        return None
    return module, attr


def _find(targets: list[Target], name: str, what: str) -> Target:
    for target in targets:
        if name in target.names:
            return target
    names = list(dict.fromkeys(n for target in targets for n in target.names))
    inside = [n for n in names if n.startswith(f"{name}.")]
    near = f" (in it: {listed(inside)})" if inside else nearest(name, names)
    raise ValueError(f'`name` must be the name of a {what}; got "{name}"{near}.')
