"""The masks in a checkpoint, under any name that `parasparse.names` lists."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from parasparse import names
from parasparse.files.checkpoint import Checkpoint, CheckpointError


@dataclass(frozen=True)
class MaskedKey:
    """A masked tensor of a checkpoint."""

    name: str  # of the dense tensor
    weight: str  # key of the stored values
    mask: str  # key of the mask, which broadcasts to them


def masked_keys(source: Checkpoint) -> list[MaskedKey]:
    """Return the masked tensors of `source` in order; raise CheckpointError if there are none."""
    found = {name: _of_stack(name, keys) for name, keys in _stacks(source).items()}
    for key in source.infos:
        for one in _beside(key, source):
            found.setdefault(one.name, one)
    masked = [one for one in found.values() if one is not None]
    twice = [one.name for one in masked if one.weight != one.name and one.name in source.infos]
    if twice:
        raise CheckpointError(
            f'"{source.path}" must hold "{twice[0]}" once; it holds it both masked and plain.'
        )
    if not masked:
        raise CheckpointError(
            f'"{source.path}" contains no masks that parasparse recognises, such as "weight_mask" '
            'beside "weight_orig", "mask" beside "weight", or "parametrizations.weight.0.mask".'
        )
    for one in masked:
        if not _broadcasts(one.mask, one.weight, source):
            shapes = [source.infos[key].shape for key in (one.weight, one.mask)]
            raise CheckpointError(
                f'the mask of "{one.name}" must broadcast to its shape, {shapes[0]}; it has '
                f"{shapes[1]}."
            )
    order = {key: number for number, key in enumerate(source.infos)}
    return sorted(masked, key=lambda one: order[one.weight])


def mask_names(source: Checkpoint) -> dict[str, str]:
    """Return the key of each mask by the name that `sparsify` takes; ties and pairs once.

    Names have no prefixes of wrappers, so they are those of the bare model.
    """
    masked = {source.plain(one.name): one for one in masked_keys(source)}
    first: dict[tuple[str, str], str] = {}
    found: dict[str, str] = {}
    read = source.read
    for name, one in masked.items():
        own = (source.ties.get(one.weight, one.weight), source.ties.get(one.mask, one.mask))
        if first.setdefault(own, name) != name:
            continue
        joint, other = _pair(name, masked)
        if other and (one.mask == other.mask or torch.equal(read(one.mask), read(other.mask))):
            found.setdefault(joint, one.mask)
        else:
            found[name] = one.mask
    return found


def computed(source: Checkpoint) -> dict[str, list[str]]:
    """Return the masked or otherwise parametrized tensors: name -> keys they are computed from."""
    found = {name: list(keys.values()) for name, keys in _stacks(source).items()}
    for key in source.infos:
        for one in _beside(key, source):
            found.setdefault(one.name, []).extend((one.weight, one.mask))
    return found


def _pair(name: str, masked: Mapping[str, MaskedKey]) -> tuple[str, MaskedKey | None]:
    """Return the name and the other component of the pair of `name`, or `name` and None."""
    for joint, other in names.joints(name):
        if other in masked:
            return joint, masked[other]
    return name, None


def _stacks(source: Checkpoint) -> dict[str, dict[str, str]]:
    """Return, for each parametrized tensor, the keys of its parametrization by their last part."""
    stacks: dict[str, dict[str, str]] = {}
    for key in source.infos:
        found = names.parametrized(key)
        if found is not None:
            stacks.setdefault(found[0], {})[found[1]] = key
    return stacks


def _of_stack(name: str, keys: Mapping[str, str]) -> MaskedKey | None:
    """Return the mask among the parametrizations of `name`; None if there is none."""
    masks = [own for own in keys if re.fullmatch(r"\d+\.mask", own)]
    if "original" in keys and len(masks) == 1 and len(keys) == 2:
        return MaskedKey(name, keys["original"], keys[masks[0]])
    if masks or any(own.endswith(".logits") for own in keys):
        raise CheckpointError(
            f'"{name}" must be a tensor and its mask; it has {", ".join(sorted(keys))}, which only '
            "its model can compute. Load it into the model, and `squash` the model."
        )
    return None


def _beside(key: str, source: Checkpoint) -> list[MaskedKey]:
    """Return the tensors beside `key` that it masks; none if it is not such a mask."""
    if names.is_own_mask(key):
        return []
    for name in names.masked_beside(key):
        stored = names.stored_keys(name, source.infos)
        if stored and (_is_prunes(name, key, source) or _is_mask(key, stored, source)):
            return [MaskedKey(names.dense_name(one), one, key) for one in stored]
    return []


def _is_prunes(name: str, mask: str, source: Checkpoint) -> bool:
    """Whether torch.nn.utils.prune wrote `mask`. spectral_norm writes x_orig as well, and x_u."""
    written = f"{name}_orig" in source.infos and f"{name}_u" not in source.infos
    return written and mask == f"{name}_mask"


def _is_mask(key: str, weights: tuple[str, ...], source: Checkpoint) -> bool:
    """Whether `key` can be a mask of `weights`; any buffer may have the name of one."""
    info = source.infos[key]
    if info.numel < 2 or not all(_broadcasts(key, one, source) for one in weights):
        return False
    values = source.read(key)
    if not (values.is_floating_point() or values.dtype == torch.bool):
        return bool(((values == 0) | (values == 1)).all())
    return bool(values.isfinite().all())


def _broadcasts(mask: str, weight: str, source: Checkpoint) -> bool:
    small, shape = source.infos[mask].shape, source.infos[weight].shape
    sizes = zip(small[::-1], shape[::-1], strict=False)
    return len(small) <= len(shape) and all(size in (1, full) for size, full in sizes)
