"""Finds the state dict in the content of a torch file, which may hold several."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from parasparse.files.checkpoint import CheckpointError
from parasparse.text import listed

# The keys from the content of a file to a state dict; none if the content is the state dict.
Place: TypeAlias = tuple[str, ...]
_USUAL = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")


class NothingToChooseError(CheckpointError):
    """A key was given for a file that has no state dict under a key."""


def state_dict_place(content: Any, path: str, key: str | None = None) -> tuple[Place, list[str]]:
    """Return the place of the state dict to read, and the keys of those that are passed over.

    Without `key`, this is the only state dict, or the only one under a usual key.

    Args:
        content: what the file at `path` holds.
        path: for errors.
        key: the keys of the place, with dots between them.

    Raises:
        CheckpointError: there is no state dict, none at `key`, or several and no `key`.
    """
    places = {".".join(place): place for place in _places(content, ())}
    usual = [name for name in places if name in _USUAL]
    if key is None and _is_state_dict(content, usual, places):
        return (), list(places)
    if key is None and not places:
        raise CheckpointError(
            f'"{path}" must hold a state dict, alone or under a key; it holds '
            f"{type(content).__name__}. Save only the state dict."
        )
    if key is None and len(places) > 1 and len(usual) != 1:
        raise CheckpointError(
            f'"{path}" holds several state dicts: {listed(places)}. Choose one with --key, such '
            f'as "--key {next(iter(places))}".'
        )
    if not places:
        raise NothingToChooseError(nothing_to_choose(path))
    chosen = (usual or list(places))[0] if key is None else key
    if chosen not in places:
        raise CheckpointError(
            f'--key must be one of {listed(places)}, the state dicts of "{path}"; got "{key}".'
        )
    return places[chosen], [name for name in places if key is None and name != chosen]


def nothing_to_choose(path: str) -> str:
    """Return why --key does not fit the file at `path`."""
    return f'--key must be left out, because "{path}" has no state dict under a key.'


def _is_state_dict(content: Any, usual: list[str], places: Collection[str]) -> bool:
    """Whether `content` is a state dict itself: a tensor may lie beside one, the best accuracy."""
    held = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in held if isinstance(value, Tensor)}
    if not places or any("." in name for name in tensors):
        return bool(tensors)
    return not usual and any(tensor.ndim > 1 for tensor in tensors.values())


def _places(content: Any, above: Place) -> Iterator[Place]:
    """Yield the places of the state dicts below `content`, but not those of optimizers."""
    if not isinstance(content, Mapping):
        return
    for key, held in content.items():
        if not isinstance(key, str) or not isinstance(held, Mapping) or "param_groups" in held:
            continue
        tensors = [value for value in held.values() if isinstance(value, Tensor)]
        numbers = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        place = (*above, key)
        if any(t.ndim > 1 for t in numbers) or (tensors and not above and key in _USUAL):
            yield place
        else:
            yield from _places(held, place)


def at(content: Any, place: Place) -> Any:
    """Return what lies at `place` of `content`."""
    for key in place:
        content = content[key]
    return content


def beside(content: Any, place: Place) -> dict[Any, Any]:
    """Return the nested `content` without what lies at `place`."""
    if not place:
        return {}
    rest = {key: value for key, value in content.items() if key != place[0]}
    inner = beside(content[place[0]], place[1:])
    return {**rest, place[0]: inner} if inner else rest


def names_beside(content: Any, place: Place) -> list[str]:
    """Return the keys of `beside`, with dots between nested ones: epoch, ema.updates."""
    if not place:
        return []
    inner = [f"{place[0]}.{name}" for name in names_beside(content[place[0]], place[1:])]
    return [*(str(key) for key in content if key != place[0]), *inner]
