"""What is known of a tensor in a run: its labels, and which entries do not depend on the input."""

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from parasparse.shrink.labels import compact, is_empty, tidy

# States of an entry. KNOWN does not depend on the input. ZERO is known, is 0, and makes 0 of
# whatever it is multiplied with. They are ordered: what is computed of several is their minimum.
UNKNOWN, KNOWN, ZERO = 0, 1, 2


@dataclass(frozen=True)
class Facts:
    """What is known of one tensor.

    Attributes:
        labels: see `labels`; tidy, none of them all 0.
        state: uint8, of the shape of the tensor, expanded where it does not vary.
    """

    labels: tuple[Tensor, ...]
    state: Tensor = field(repr=False)


def facts(labels: list[Tensor], state: Tensor) -> Facts:
    """Return the facts of a tensor; labels are tidied, and equal or empty ones left out."""
    kept: list[Tensor] = []
    for label in map(tidy, labels):
        if not is_empty(label) and not any(_equal(label, other) for other in kept):
            kept.append(label)
    return Facts(tuple(kept), tidy(state))


def everywhere(state: int, shape: torch.Size) -> Tensor:
    """Return a state that is the same everywhere."""
    return _STATES[state].expand(shape)


_STATES = torch.tensor([UNKNOWN, KNOWN, ZERO], dtype=torch.uint8, device="cpu").unbind()


def with_zeros(state: Tensor, value: Tensor) -> Tensor:
    """Return `state` where known entries are ZERO if `value` is 0 there, and KNOWN if not.

    Along dimensions where the state does not vary, all of `value` must be 0.
    """
    small = compact(state)
    if not bool(small.any()):
        return state
    if value.is_meta or not value.numel():
        return torch.clamp(small, max=KNOWN).expand(state.shape)
    same = [dim for dim in range(value.ndim) if small.shape[dim] == 1 < value.shape[dim]]
    there = _has_others_than_0(value, same) if same else value != 0
    return (torch.clamp(small, max=KNOWN) * (2 - there.cpu().to(torch.uint8))).expand(state.shape)


def _has_others_than_0(value: Tensor, dims: list[int]) -> Tensor:
    """Return whether there are entries along `dims` that are not 0, with sizes 1 there."""
    if value.is_floating_point():  # much faster than `any`
        return value.abs().sum(dims, keepdim=True) != 0
    return (value != 0).any(dim=dims, keepdim=True)


def lowest_of(states: list[Tensor], shape: torch.Size) -> Tensor:
    """Return the lowest of states that broadcast to `shape`, entry by entry."""
    if len(states) == 1 and states[0].shape == shape:
        return states[0]
    small = [compact(state) for state in states]
    return reduce(torch.minimum, small).expand(shape)


def zero_where(state: Tensor, zero: Tensor) -> Tensor:
    """Return `state` with ZERO where `zero`, of a shape that broadcasts to that of it, is ZERO."""
    small = compact(zero)
    if not bool((small == ZERO).any()):
        return state
    return torch.where(small == ZERO, small, compact(state)).expand(state.shape)


def worst(state: Tensor, dims: list[int], size: torch.Size) -> Tensor:
    """Return the lowest state along `dims`, everywhere along them, for a tensor of `size`."""
    state = compact(state)
    for dim in dims:
        state = state.amin(dim, keepdim=True) if state.shape[dim] else state
    return state.expand(size)


def lowest_along(state: Tensor, dim: int) -> Tensor:
    """Return the lowest state of each index of `dim`."""
    small = compact(state).movedim(dim, 0).flatten(1)
    return small.amin(1).expand(state.shape[dim]) if small.shape[1] else small.new_ones(len(small))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and torch.equal(compact(a), compact(b))
