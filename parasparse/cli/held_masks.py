"""Masks that a checkpoint holds: ours, those of torch.nn.utils.prune and of cplxmodule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from parasparse.files.checkpoint import Checkpoint, CheckpointError
from parasparse.names import PAIR_ENDINGS

_STACK = re.compile(r"(?P<layer>(?:.+\.)?)parametrizations\.(?P<attr>[^.]+)\.(?P<own>.+)")


@dataclass(frozen=True)
class MaskedKey:
    """A masked tensor of a checkpoint.

    Attributes:
        name: what it is called when it is dense.
        weight: the key of its values.
        mask: the key of its mask.
    """

    name: str
    weight: str
    mask: str


def masked_keys(source: Checkpoint) -> list[MaskedKey]:
    """Return the masked tensors of `source`, in its order.

    Raises:
        CheckpointError: there is none; a mask has another shape; something lies under or in the
            place of a mask that only the model can compute.
    """
    stacks: dict[str, dict[str, str]] = {}
    for key in source.infos:
        match = _STACK.fullmatch(key)
        if match:
            name = match["layer"] + match["attr"]
            stacks.setdefault(name, {})[match["own"]] = key
    found = {name: _of_stack(name, keys) for name, keys in stacks.items()}
    for key in source.infos:
        for one in _foreign(key, source):
            found.setdefault(one.name, one)
    masked = [one for one in found.values() if one is not None]
    twice = [one.name for one in masked if one.weight != one.name and one.name in source.infos]
    if twice:
        raise CheckpointError(
            f'"{source.path}" must hold "{twice[0]}" once; it is there masked, and plain as well.'
        )
    if not masked:
        raise CheckpointError(
            f'"{source.path}" must hold masks: of parasparse, of torch.nn.utils.prune or of '
            "cplxmodule; it holds none."
        )
    for one in masked:
        shapes = [source.infos[key].shape for key in (one.weight, one.mask)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f'the mask of "{one.name}" must have its shape, {shapes[0]}; it has {shapes[1]}.'
            )
    order = {key: number for number, key in enumerate(source.infos)}
    return sorted(masked, key=lambda one: order[one.weight])


def mask_names(source: Checkpoint) -> dict[str, str]:
    """Return the key of each mask by the name that `sparsify` takes: a tie once, a pair as one."""
    masked = {one.name: one for one in masked_keys(source)}
    first: dict[tuple[str, str], str] = {}
    names: dict[str, str] = {}
    for name, one in masked.items():
        own = (source.ties.get(one.weight, one.weight), source.ties.get(one.mask, one.mask))
        if first.setdefault(own, name) != name:
            continue
        joint, other = _pair(name, masked)
        if other is None or not _are_equal(source, one.mask, other.mask):
            names[name] = one.mask
        else:
            names.setdefault(joint, one.mask)
    return names


def computed(source: Checkpoint) -> dict[str, list[str]]:
    """Return what a model computes, by name, and the keys of what it is computed from.

    That is what lies under a mask, or under another parametrization.
    """
    names: dict[str, list[str]] = {}
    for key in source.infos:
        match = _STACK.fullmatch(key)
        if match:
            names.setdefault(match["layer"] + match["attr"], []).append(key)
        for one in _foreign(key, source):
            names.setdefault(one.name, []).extend((one.weight, one.mask))
    return names


def _pair(name: str, masked: Mapping[str, MaskedKey]) -> tuple[str, MaskedKey | None]:
    """Return the joint name of a pair, and its other part; none if `name` is of no pair."""
    for endings in (*PAIR_ENDINGS, (".real", ".imag")):
        for own, other in (endings, endings[::-1]):
            found = masked.get(name.removesuffix(own) + other)
            if name.endswith(own) and found is not None:
                return name.removesuffix(own), found
    return name, None


def _are_equal(source: Checkpoint, one: str, two: str) -> bool:
    return one == two or torch.equal(source.read(one), source.read(two))


def _of_stack(name: str, keys: Mapping[str, str]) -> MaskedKey | None:
    """Return what a stack of parametrizations holds; None if no mask is in it."""
    masks = [own for own in keys if re.fullmatch(r"\d+\.mask", own)]
    if "original" in keys and len(masks) == 1 and len(keys) == 2:
        return MaskedKey(name, keys["original"], keys[masks[0]])
    if masks or any(own.endswith(".logits") for own in keys):
        raise CheckpointError(
            f'"{name}" must be a tensor and its mask; it has {", ".join(sorted(keys))}, which only '
            "its model can compute. Load it into the model, and `squash` that."
        )
    return None


def _foreign(key: str, source: Checkpoint) -> list[MaskedKey]:
    """Return what the mask `key` of another library masks; nothing if it is none."""
    layer, _, own = key.rpartition(".")
    dot = f"{layer}." if layer else ""
    if own.endswith("_mask") and f"{dot}{own.removesuffix('_mask')}_orig" in source.infos:
        name = dot + own.removesuffix("_mask")
        return [MaskedKey(name, f"{name}_orig", key)]
    if own != "mask":
        return []
    names = [f"{dot}weight"] if f"{dot}weight" in source.infos else []
    names = names or [f"{dot}weight.real", f"{dot}weight.imag"]
    shape = source.infos[key].shape
    fits = all(n in source.infos and source.infos[n].shape == shape for n in names)
    return [MaskedKey(name, name, key) for name in names] if fits else []
