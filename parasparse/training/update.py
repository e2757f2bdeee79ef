"""One update of dynamic sparse training: prune, redistribute, grow, within an exact budget."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasparse._checks import listed
from parasparse.patterns import n_of_m
from parasparse.training.masking import Masking, Need, need_of
from parasparse.training.moves import (
    GROWTH,
    GROWTH_SCORES,
    PRUNE,
    REDISTRIBUTION,
    no_redistribution,
    shared_out,
)

_FULL = 0.99  # of what is free in a layer is the most that it takes, as long as others can
_NEARLY_FULL = 0.2  # of zeros


@dataclass(frozen=True)
class Moves:
    """The three functions; a string names one of `training.moves`."""

    prune: Callable[..., Any]
    growth: Callable[..., Any]
    redistribution: Callable[..., Any]

    @classmethod
    def named(cls, prune: Any, growth: Any, redistribution: Any) -> Moves:
        """Return the functions that names, or functions, stand for.

        Raises:
            ValueError: there is no move of that name.
            TypeError: it is neither.
        """
        return cls(
            _named("prune", prune, PRUNE),
            _named("growth", growth, GROWTH),
            _named("redistribution", redistribution, REDISTRIBUTION),
        )

    @property
    def needs(self) -> set[Need]:
        """What the three read."""
        return {need_of(move) for move in (self.prune, self.growth, self.redistribution)}

    @property
    def stay(self) -> bool:
        """Whether each layer regrows what it loses."""
        return self.redistribution is no_redistribution and not self.grow_globally

    @property
    def prune_globally(self) -> bool:
        """Whether `prune(masking)` is for all layers at once."""
        return _arity(self.prune) == 1

    @property
    def grow_globally(self) -> bool:
        """Whether `growth(masking, total_regrowth)` is for all layers at once."""
        return _arity(self.growth) == 2


def next_masks(
    view: Masking, moves: Moves, missing: Mapping[str, int], groups: Mapping[str, n_of_m]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the masks after an update, and what is missing of the budget by layer.

    Args:
        view: its dicts are filled in on the way.
        moves: the functions.
        missing: connections that growth fell short of so far.
        groups: the pattern of layers whose groups keep their n.

    Raises:
        ValueError, TypeError: a move returns what it must not.
    """
    _set_importance(view, moves)
    before = {name: mask.clone() for name, mask in view.masks.items()}
    pruned = _pruned(view, moves, before)
    view.masks.update({name: mask.clone() for name, mask in pruned.items()})
    counts = {name: int(mask.count_nonzero()) for name, mask in pruned.items()}
    view.name2removed.update({n: view.name2nonzeros[n] - count for n, count in counts.items()})
    owed = sum(missing.values())
    if moves.grow_globally:
        moves.growth(view, view.total_removed + owed)
        masks = {n: _checked(view.masks[n], pruned[n], "growth", n) for n in pruned}
        grown = sum(int(mask.count_nonzero()) for mask in masks.values()) - sum(counts.values())
        _check_number(grown, view.total_removed + owed, "all layers")
        return masks, {"": view.total_removed + owed - grown}
    shares = _shares(view, moves, missing, counts)
    masks, left = {}, {}
    for name, mask in pruned.items():
        if name in groups:
            masks[name] = _grown_in_groups(view, moves, name, mask, groups[name])
        else:
            masks[name] = _grown(view, moves, name, mask, shares[name])
        left[name] = shares[name] - int(masks[name].count_nonzero()) + counts[name]
        _check_number(shares[name] - left[name], shares[name], name)
    return masks, left


def _set_importance(view: Masking, moves: Moves) -> None:
    found = {}
    view.name2prune_rate.update(dict.fromkeys(view.masks, view.prune_rate))
    for name, weight in view.weights.items():
        # A function of a layer without connections would be a mean of nothing.
        value = 0.0
        if view.name2nonzeros[name]:
            value = moves.redistribution(view, name, weight, view.masks[name].float())
        found[name] = _importance(value, name)
    total = sum(found.values())
    if math.isinf(total):
        raise ValueError("`redistribution` must return numbers whose sum is finite; got inf.")
    mean = 1 / len(found)
    view.name2variance.update({n: v / total if total else mean for n, v in found.items()})
    for name, mask in view.masks.items():
        sparsity = view.name2zeros[name] / mask.numel()
        if sparsity < _NEARLY_FULL and view.name2variance[name] > mean:
            view.name2prune_rate[name] = min(sparsity, view.prune_rate)


def _importance(value: Any, name: str) -> float:
    try:
        importance = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f'`redistribution` must return a number; got {value!r:.60} for "{name}".'
        ) from error
    if not (math.isfinite(importance) and importance >= 0):
        raise ValueError(
            f'`redistribution` must return a finite number >= 0; got {importance} for "{name}".'
        )
    return importance


def _pruned(view: Masking, moves: Moves, before: dict[str, Tensor]) -> dict[str, Tensor]:
    if moves.prune_globally:
        moves.prune(view)
        new = view.masks
    else:
        new = {
            name: moves.prune(view, mask.float(), view.weights[name], name) if mask.any() else mask
            for name, mask in before.items()
        }
    masks = {name: _mask(new[name], mask, "prune", name) for name, mask in before.items()}
    for name, mask in masks.items():
        if bool((mask & ~before[name]).any()):
            raise ValueError(f'`prune` must keep a part of the mask; it adds entries to "{name}".')
    return masks


def _shares(
    view: Masking, moves: Moves, missing: Mapping[str, int], counts: dict[str, int]
) -> dict[str, int]:
    """Return how many connections each layer grows."""
    if moves.stay:
        return {name: view.name2removed[name] + missing.get(name, 0) for name in counts}
    total = view.total_removed + sum(missing.values())
    free = {name: mask.numel() - counts[name] for name, mask in view.masks.items()}
    # A layer that lost its last connection would pass nothing on, ever again.
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
    new = moves.growth(view, name, mask.clone(), share, view.weights[name])
    return _checked(new, mask, "growth", name)


def _grown_in_groups(
    view: Masking, moves: Moves, name: str, mask: Tensor, pattern: n_of_m
) -> Tensor:
    scores = GROWTH_SCORES[moves.growth](view, view.weights[name])
    return pattern(torch.where(mask, math.inf, scores))


def _checked(new: Any, pruned: Tensor, argument: str, name: str) -> Tensor:
    mask = _mask(new, pruned, argument, name)
    if bool((pruned & ~mask).any()):
        raise ValueError(f'`{argument}` must keep the mask that it gets; it drops from "{name}".')
    return mask


def _mask(new: Any, like: Tensor, argument: str, name: str) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != like.shape or new.is_complex():
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(
            f"`{argument}` must return a real or bool mask of shape {tuple(like.shape)} for "
            f'"{name}"; got {got}.'
        )
    return (new.detach() != 0).to(like.device)


def _check_number(grown: int, share: int, name: str) -> None:
    if grown > share:
        raise ValueError(
            f'`growth` must add {share} connections at most to "{name}"; it adds {grown}.'
        )


def _named(argument: str, move: Any, known: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if isinstance(move, str):
        if move not in known:
            raise ValueError(
                f"`{argument}` must be one of {listed(known)}, or a function; got {move!r}."
            )
        return known[move]
    if not callable(move):
        raise TypeError(f"`{argument}` must be a name or a function; got {move!r}.")
    return move  # type: ignore[no-any-return]


def _arity(move: Callable[..., Any]) -> int | None:
    """Return how many arguments `move` takes, None if that is any number."""
    parameters = inspect.signature(move).parameters.values()
    return None if any(p.kind == p.VAR_POSITIONAL for p in parameters) else len(parameters)
