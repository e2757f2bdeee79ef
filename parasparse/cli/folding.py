"""Masks that a checkpoint holds: ours, those of torch.nn.utils.prune and of cplxmodule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from parasparse.cli.checkpoint import Checkpoint, CheckpointError

_STACK = re.compile(r"(?P<layer>(?:.+\.)?)parametrizations\.(?P<attr>[^.]+)\.(?P<own>.+)")


@dataclass(frozen=True)
class Held:
    """A masked tensor of a checkpoint.

    Attributes:
        name: what it is called when it is dense.
        weight: the key of its values.
        mask: the key of its mask.
    """

    name: str
    weight: str
    mask: str


def held(source: Checkpoint) -> list[Held]:
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


def _of_stack(name: str, keys: Mapping[str, str]) -> Held | None:
    """Return what a stack of parametrizations holds; None if no mask is in it."""
    masks = [own for own in keys if re.fullmatch(r"\d+\.mask", own)]
    if "original" in keys and len(masks) == 1 and len(keys) == 2:
        return Held(name, keys["original"], keys[masks[0]])
    if masks or any(own.endswith(".logits") for own in keys):
        raise CheckpointError(
            f'"{name}" must be a tensor and its mask; it has {", ".join(sorted(keys))}, which only '
            "its model can compute. Load it into the model, and `squash` that."
        )
    return None


def _foreign(key: str, source: Checkpoint) -> list[Held]:
    """Return what the mask `key` of another library masks; nothing if it is none."""
    layer, _, own = key.rpartition(".")
    dot = f"{layer}." if layer else ""
    if own.endswith("_mask") and f"{dot}{own.removesuffix('_mask')}_orig" in source.infos:
        name = dot + own.removesuffix("_mask")
        return [Held(name, f"{name}_orig", key)]
    if own != "mask":
        return []
    names = [f"{dot}weight"] if f"{dot}weight" in source.infos else []
    names = names or [f"{dot}weight.real", f"{dot}weight.imag"]
    shape = source.infos[key].shape
    fits = all(n in source.infos and source.infos[n].shape == shape for n in names)
    return [Held(name, name, key) for name in names] if fits else []
