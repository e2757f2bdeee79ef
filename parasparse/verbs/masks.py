"""Masks of a model by name: list them, read them, replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.attach import reading
from parasparse.attach.stand_in import check_not_accelerated
from parasparse.masks.convert import as_mask
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import masked_targets
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


def penalty(model: nn.Module, targets: Any = None) -> Tensor:
    """Return the sum of the penalties of the gates of `model`, a scalar with its graph.

    Add it to the loss, times a lambda: each gate's `SoftMask.penalty` of the weight that it gets.

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
        gate = stack.mask
        if isinstance(gate, SoftMask) and gate not in seen:  # ties and pairs share one
            seen.add(gate)
            # Reading what lies under a mask may change it: spectral_norm iterates.
            sums.append(gate.penalty(gate.logits if gate.is_product else stack.received()))
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


def deploy_masks(
    model: nn.Module,
    masks: Mapping[str, Any] | None = None,
    *,
    state_dict: Mapping[str, Any] | None = None,
    prefix: str = "",
    reset: bool = False,
    strict: bool = True,
) -> nn.Module:
    """Set the masks of `model` that are there already; return the model.

    Args:
        model: a model with masks; changed in place.
        masks: mask by name, as `named_masks` yields them; `layer`, `layer.mask` and
            `layer.weight_mask` name the mask of `layer.weight`. Any mask that `Mask.mask_` takes;
            None unsets.
        state_dict: another word for `masks`.
        prefix: take the keys that start with it and a dot, without them; others are not looked at.
        reset: unset all masks that are not given.
        strict: refuse keys that name no mask.

    Raises:
        ValueError: an unknown key; two keys for one mask; a mask with NaN.
        RuntimeError: a mask's shape does not match. The model is as it was.

    Examples:
        >>> from parasparse import sparsify
        >>> model = deploy_masks(sparsify(nn.Linear(2, 1), 0.5), {"weight": [[True, False]]})
        >>> mask_of(model, "weight").tolist()
        [[True, False]]

    Reference: cplxmodule, `nn.masked.deploy_masks`. Differs: a key that names no mask is refused.
    """
    given = masks if masks is not None else state_dict
    if given is None:
        raise TypeError("`masks` must be given, a mask by name; got None.")
    check_not_accelerated(model)
    reshard(model)
    targets = masked_targets(model)
    keys = mask_keys(targets)
    if prefix:
        start = f"{prefix}."
        given = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
        if strict and not given:
            raise ValueError(f'`masks` must hold keys that start with "{start}"; there are none.')
    unknown = [key for key in given if key not in keys]
    if unknown and strict:
        near = "".join(nearest(key, keys) for key in unknown[:1])
        raise ValueError(
            f"`masks` must name masks of the model; {listed(unknown)} name none of "
            f"{len(targets)}{near}. To put masks on dense tensors use `sparsify(model, masks)`, to "
            "pass over such keys `strict=False`."
        )
    chosen: dict[int, tuple[Mask, Any]] = {}
    for key, value in given.items():
        if key in keys:
            mask = _plain_mask(keys[key])
            if id(mask) in chosen:
                raise ValueError(f'`masks` must name each mask once; "{key}" names one again.')
            checked = None if value is None else _copied(value, keys[key])
            chosen[id(mask)] = (mask, checked)
    if reset:
        for target in targets:
            mask = _plain_mask(target)
            chosen.setdefault(id(mask), (mask, None))
    for mask, value in chosen.values():
        mask.mask_(value)
    return model


def mask_keys(targets: list[Target]) -> dict[str, Target]:
    """Return what a mask may be called in a dict of masks, for each of `targets`."""
    keys = {name: target for target in targets for name in target.names}
    for target in targets:
        for name in target.names:
            layer, dot, own = name.rpartition(".")
            keys.setdefault(f"{name}_mask", target)
            keys.setdefault(f"{name}.mask", target)
            if own == "weight":
                keys.setdefault(layer, target)
                keys.setdefault(f"{layer}{dot}mask", target)
    return keys


def _copied(value: Any, target: Target) -> Tensor:
    """Return a mask for `target`; not the live one of another target, which may change first."""
    tensor = target.stored()
    return as_mask(value, tensor.shape, tensor.dtype).clone()


def _plain_mask(target: Target) -> Mask:
    mask = target.masks()[0]
    if not isinstance(mask, Mask):
        raise ValueError(
            f'`masks` must name plain masks; that of "{target.name}" is a {type(mask).__name__}. '
            "`binarize` the model first."
        )
    return mask


def _find(targets: list[Target], name: str, what: str) -> Target:
    for target in targets:
        if name in target.names:
            return target
    names = list(dict.fromkeys(n for target in targets for n in target.names))
    inside = [n for n in names if n.startswith(f"{name}.")]
    near = f" (in it: {listed(inside)})" if inside else nearest(name, names)
    raise ValueError(f'`name` must be that of a {what}; got "{name}"{near}.')
