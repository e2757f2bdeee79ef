"""One update of dynamic sparse training: prune, redistribute, grow, within an exact budget."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasparse.patterns import n_of_m
from parasparse.patterns.ranked import mask_for
from parasparse.sharding.dtensors import count_nonzero, full_tensor, laid_out_like
from parasparse.text import listed
from parasparse.training.dynamic.moves import (
    GROWTH,
    GROWTH_SCORES,
    PRUNE,
    REDISTRIBUTION,
    no_redistribution,
    shared_out,
)
from parasparse.training.dynamic.view import Masking, Need, needs_of

_FULL = 0.99  # the largest share of its free entries that a layer grows, while others have room
_NEARLY_FULL = 0.2  # sparsity below which the prune rate may be lower


@dataclass(frozen=True)
class Moves:
    """The three moves of an update; names stand for functions of `training/dynamic/moves.py`."""

    prune: Callable[..., Any]
    growth: Callable[..., Any]
    redistribution: Callable[..., Any]

    @classmethod
    def named(cls, prune: Any, growth: Any, redistribution: Any) -> Moves:
        """Return the moves for names or functions; raise ValueError or TypeError for others."""
        growth_of_layer = "masking, name, new_mask, total_regrowth, weight"
        return cls(
            _move("prune", prune, PRUNE, "masking, mask, weight, name", "masking"),
            _move("growth", growth, GROWTH, growth_of_layer, "masking, total_regrowth"),
            _move("redistribution", redistribution, REDISTRIBUTION, "masking, name, weight, mask"),
        )

    @property
    def needs(self) -> set[Need]:
        """The union of what the three moves read."""
        return {*needs_of(self.prune), *needs_of(self.growth), *needs_of(self.redistribution)}

    @property
    def keep_sizes(self) -> bool:
        """Whether each layer keeps its number of connections."""
        per_layer = _takes(self.prune, 4) and not self.grow_globally
        return self.redistribution is no_redistribution and per_layer

    @property
    def grow_globally(self) -> bool:
        """Whether `growth(masking, total_regrowth)` is for all layers at once."""
        return not _takes(self.growth, 5)


def next_masks(
    view: Masking,
    moves: Moves,
    missing: Mapping[str, int],
    groups: Mapping[str, n_of_m],
    compact: Mapping[str, Callable[[Tensor, int], Any]],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the masks after an update, and by layer how many connections growth could not add.

    `missing` are these numbers of the last update; `groups` are the patterns of n:m layers.
    `compact` are the functions that grow compact layers: from a mask of their values and the number
    of connections to grow, to their kept entries. The dicts of `view` are filled in. Raises
    ValueError or TypeError if a move returns a wrong result.
    """
    _set_importance(view, moves)
    before = {name: mask.clone() for name, mask in view.masks.items()}
    pruned = _pruned(view, moves, before)
    view.masks.update({name: mask.clone() for name, mask in pruned.items()})
    counts = {name: count_nonzero(mask) for name, mask in pruned.items()}
    view.name2removed.update({n: view.name2nonzeros[n] - count for n, count in counts.items()})
    owed = sum(missing.values())
    if moves.grow_globally:
        moves.growth(view, view.total_removed + owed)
        masks = {n: _checked(view.masks[n], pruned[n], "growth", n) for n in pruned}
        grown = sum(count_nonzero(mask) for mask in masks.values()) - sum(counts.values())
        _check_number(grown, view.total_removed + owed, "all layers")
        return masks, {"": view.total_removed + owed - grown}
    shares = _shares(view, moves, missing, counts)
    masks, left = dict[str, Any](), dict[str, int]()
    for name, mask in pruned.items():
        if name in groups:
            scores = GROWTH_SCORES[moves.growth](view, view.weights[name])
            masks[name] = mask_for(groups[name], torch.where(mask, math.inf, scores))
            continue
        if name in compact:
            masks[name] = compact[name](mask, shares[name])
            continue
        masks[name] = _grown(view, moves, name, mask, shares[name])
        grown = count_nonzero(masks[name]) - counts[name]
        _check_number(grown, shares[name], name)
        left[name] = shares[name] - grown
    return masks, left


def _set_importance(view: Masking, moves: Moves) -> None:
    found = {}
    view.name2prune_rate.update(dict.fromkeys(view.masks, view.prune_rate))
    for name, weight in view.weights.items():
        # Without connections, redistribution would average nothing.
        value = 0.0
        if view.name2nonzeros[name]:
            mask = view.masks[name].float()
            value = _called(moves.redistribution, name, view, name, weight, mask)
        found[name] = _importance(value, name)
    total = sum(found.values())
    if math.isinf(total):
        raise ValueError("`redistribution` must return numbers whose sum is finite; got inf.")
    mean = 1 / len(found)
    view.name2variance.update({n: v / total if total else mean for n, v in found.items()})
    for name in view.masks:
        zeros = view.name2zeros[name]
        sparsity = zeros / (zeros + view.name2nonzeros[name])
        if sparsity < _NEARLY_FULL and view.name2variance[name] > mean:
            view.name2prune_rate[name] = min(sparsity, view.prune_rate)


def _called(move: Callable[..., Any], layer: str, *arguments: Any) -> Any:
    try:
        return move(*arguments)
    except Exception as error:
        error.add_note(f'while {getattr(move, "__name__", move)} was called for "{layer}"')
        raise


def _importance(value: Any, name: str) -> float:
    """Return `value` as a float, at least 0."""
    try:
        value = full_tensor(value) if isinstance(value, Tensor) else value
        importance = float("nan" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f'`redistribution` must return a number; got {value!r:.60} for "{name}".'
        ) from error
    if not math.isfinite(importance):
        raise ValueError(
            f'`redistribution` must return a finite number; got {value!r:.60} for "{name}".'
        )
    return max(importance, 0.0)


def _pruned(view: Masking, moves: Moves, before: dict[str, Tensor]) -> dict[str, Tensor]:
    if not _takes(moves.prune, 4):  # `prune(masking)`, for all layers at once
        moves.prune(view)
        new = view.masks
    else:
        new = {
            name: _called(moves.prune, name, view, mask.float(), view.weights[name], name)
            if view.name2nonzeros[name]
            else mask
            for name, mask in before.items()
        }
    masks = {name: _mask(new[name], mask, "prune", name) for name, mask in before.items()}
    for name, mask in masks.items():
        if count_nonzero(mask & ~before[name]):
            raise ValueError(f'`prune` must not add entries to the mask; it does to "{name}".')
    return masks


def _shares(
    view: Masking, moves: Moves, missing: Mapping[str, int], counts: dict[str, int]
) -> dict[str, int]:
    """Return how many connections each layer grows."""
    if moves.redistribution is no_redistribution:
        return {name: view.name2removed[name] + missing.get(name, 0) for name in counts}
    total = view.total_removed + sum(missing.values())
    free = {n: view.name2zeros[n] + view.name2removed[n] for n in counts}
    # A layer without connections would never have a gradient again.
    first = {name: int(count == 0) for name, count in counts.items()}
    if sum(first.values()) > total:
        first = dict.fromkeys(counts, 0)
    room = {name: max(int(_FULL * free[name]) - first[name], 0) for name in counts}
    left = total - sum(first.values())
    if sum(room.values()) < left:
        room = {name: free[name] - first[name] for name in counts}
    importance = [view.name2variance[name] for name in counts]
    shares = shared_out(left, importance, [room[name] for name in counts])
    return {name: first[name] + share for name, share in zip(counts, shares, strict=True)}


def _grown(view: Masking, moves: Moves, name: str, mask: Tensor, share: int) -> Tensor:
    if not share:
        return mask
    new = _called(moves.growth, name, view, name, mask.clone(), share, view.weights[name])
    return _checked(new, mask, "growth", name)


def _checked(new: Any, pruned: Tensor, argument: str, name: str) -> Tensor:
    mask = _mask(new, pruned, argument, name)
    if count_nonzero(pruned & ~mask):
        raise ValueError(f'`{argument}` must not drop entries of the mask; it does in "{name}".')
    return mask


def _mask(new: Any, like: Tensor, argument: str, name: str) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != like.shape or new.is_complex():
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(
            f"`{argument}` must return a real or bool mask of shape {tuple(like.shape)} for "
            f'"{name}"; got {got}.'
        )
    return laid_out_like(new.detach() != 0, like).to(like.device)


def _check_number(grown: int, share: int, name: str) -> None:
    if grown > share:
        raise ValueError(
            f'`growth` must add at most {share} connections to "{name}"; it adds {grown}.'
        )


def _move(
    argument: str, move: Any, known: Mapping[str, Callable[..., Any]], *signatures: str
) -> Callable[..., Any]:
    if isinstance(move, str):
        if move not in known:
            raise ValueError(
                f"`{argument}` must be one of {listed(known)} or a function; got {move!r}."
            )
        return known[move]
    if not callable(move):
        raise TypeError(f"`{argument}` must be a name or a function; got {move!r}.")
    if not any(_takes(move, signature.count(",") + 1) for signature in signatures):
        forms = " or ".join(f"({signature})" for signature in signatures)
        raise TypeError(f"`{argument}` must take {forms}; got {inspect.signature(move)}.")
    return move  # type: ignore[no-any-return]


def _takes(move: Callable[..., Any], number: int) -> bool:
    try:
        inspect.signature(move).bind(*[None] * number)
    except TypeError:
        return False
    return True
