"""Distributions: shapes and one sparsity in, a sparsity for each tensor out.

A distribution is any callable `(shapes by name, sparsity) -> sparsity by name`. The distributions
below keep exactly `num_kept(n, sparsity)` of the n entries of all tensors. With a pattern of units
(blocks, channels, heads), sparsities count units instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from torch import Tensor

from parasparse.counts import check_floors, check_sparsity, least_kept, num_kept
from parasparse.text import listed

Shapes = Mapping[str, tuple[int, ...]]
Floors = float | Mapping[str, float]
_TINY = 1e-12


class _Statistics(Protocol):
    """What `owl` reads of the statistics of `scores.collect`."""

    def stored(self, name: str) -> Tensor: ...
    def input_norm(self, name: str) -> Tensor: ...


def uniform(shapes: Shapes, sparsity: float, *, max_sparsity: Floors = 1.0) -> dict[str, float]:
    """Return the same sparsity for all tensors, except for single entries to make the total exact.

    Args:
        shapes: shape of each tensor, by name.
        sparsity: share of zeros of all tensors together, in [0, 1].
        max_sparsity: upper bound for each tensor: a number, or numbers by name (1 for the others).
            Below 1, each tensor keeps at least one entry. Bind it with
            `functools.partial(uniform, max_sparsity=0.99)`.

    Raises:
        ValueError: a share is outside [0, 1], `max_sparsity` has an unknown name, or it keeps more
            entries than `sparsity` allows.

    Examples:
        >>> uniform({"a": (10, 10), "b": (5, 5)}, 0.8)
        {'a': 0.8, 'b': 0.8}
    """
    return _shared_out(shapes, sparsity, max_sparsity, _weighed(shapes, math.prod))


def erdos_renyi(shapes: Shapes, sparsity: float, *, max_sparsity: Floors = 1.0) -> dict[str, float]:
    """Return sparsities with 1 - s proportional to (n_out + n_in) / (n_out * n_in), at most 1.

    n_out and n_in are the first two dimensions. With fewer dimensions, the ratio is 1. See
    `uniform` for the arguments and errors.

    Examples:
        >>> shares = erdos_renyi({"wide": (100, 100), "narrow": (10, 10)}, 0.9)
        >>> {name: round(sparsity, 3) for name, sparsity in shares.items()}
        {'wide': 0.908, 'narrow': 0.08}

    Reference: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
        Connectivity", 2018, arXiv:1707.04780, equation 2.
    """
    return _shared_out(shapes, sparsity, max_sparsity, _weighed(shapes, _edges))


def erk(shapes: Shapes, sparsity: float, *, max_sparsity: Floors = 1.0) -> dict[str, float]:
    """Return sparsities with 1 - s proportional to (sum of dims) / (product of dims), at most 1.

    Erdos-Renyi-Kernel: unlike `erdos_renyi`, it uses the kernel dimensions of a convolution. See
    `uniform` for the arguments and errors.

    Examples:
        >>> shares = erk({"conv": (64, 64, 3, 3), "fc": (10, 64)}, 0.9)
        >>> {name: round(sparsity, 3) for name, sparsity in shares.items()}
        {'conv': 0.916, 'fc': 0.0}

    Reference: Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, section 3 (1). Differs:
        the other tensors keep the entries that full tensors have no room for, and the total is
        exact after rounding.
    """
    weights = _weighed(shapes, lambda shape: sum(shape) if shape else 1)
    return _shared_out(shapes, sparsity, max_sparsity, weights)


@dataclass(frozen=True)
class linear_in_depth:  # noqa: N801 - a distribution reads as a function
    """Return sparsities that rise by `step` from each block to the next.

    The tensors of a block share one sparsity. A block is the part of a name up to its first number,
    as in "model.layers.3"; other tensors are blocks of their own, in the order of `shapes`. A
    sparsity beyond 0 or 1 stops there, and the others make up for it. See `uniform` for errors.

    Args:
        step: the difference between two blocks; below 0, later blocks are denser.

    Examples:
        >>> shapes = {f"layers.{i}.weight": (100, 100) for i in range(3)}
        >>> list(linear_in_depth(0.1)(shapes, 0.5).values())
        [0.4, 0.5, 0.6]

    Reference: "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
        Perspective", 2025, arXiv:2502.14770. Differs: the mean over entries is exact.
    """

    step: float

    def __call__(self, shapes: Shapes, sparsity: float) -> dict[str, float]:
        """Return the sparsity of each tensor."""
        depths = {block: depth for depth, block in enumerate(dict.fromkeys(map(_block_of, shapes)))}
        denser = {name: -self.step * depths[_block_of(name)] for name in shapes}
        return _shifted(shapes, sparsity, denser)


@dataclass(frozen=True, eq=False)
class owl:  # noqa: N801
    """Return sparsities that are lower in blocks with more outliers, by at most 2 `spread`.

    An outlier is a weight whose |w| times the norm of its input is more than `threshold` times the
    mean in its block. Blocks are those of `linear_in_depth`.

    Args:
        statistics: from `scores.collect`, of all tensors that get a sparsity.
        threshold: how many times the mean.
        spread: how far the sparsity of a block may be from the middle.

    Raises:
        RuntimeError: on call, if no input of a tensor was collected.

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2023, arXiv:2310.05175.
        Differs: the mean over entries is exact.
    """

    statistics: _Statistics
    threshold: float = field(default=5.0, kw_only=True)
    spread: float = field(default=0.08, kw_only=True)

    def __call__(self, shapes: Shapes, sparsity: float) -> dict[str, float]:
        """Return the sparsity of each tensor."""
        blocks: dict[str, list[str]] = {}
        for name in shapes:
            blocks.setdefault(_block_of(name), []).append(name)
        shares = {block: self._share(names) for block, names in blocks.items()}
        least, most = min(shares.values(), default=0.0), max(shares.values(), default=0.0)
        scale = 2 * self.spread / (most - least) if most > least else 0.0
        denser = {name: scale * (shares[_block_of(name)] - least) for name in shapes}
        return _shifted(shapes, sparsity, denser)

    def _share(self, names: list[str]) -> float:
        """Return the share of outliers among the weights of a block."""
        scores = {n: self.statistics.stored(n).abs() * self.statistics.input_norm(n) for n in names}
        numel = sum(score.numel() for score in scores.values())
        mean = sum(score.double().sum() for score in scores.values()) / max(numel, 1)
        outliers = sum(int((s > self.threshold * mean).sum()) for s in scores.values())
        return outliers / max(numel, 1)


def _block_of(name: str) -> str:
    """Return `name` up to its first number, or `name`."""
    found = re.match(r"(.*?\b\d+)\.", name)
    return found[1] if found else name


def _shifted(shapes: Shapes, sparsity: float, denser: Mapping[str, float]) -> dict[str, float]:
    """Return sparsities that differ as `denser` says, by name: higher keeps more."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    middle = sum(sizes[name] * shift for name, shift in denser.items()) / max(total, 1)
    kept = {name: 1 - check_sparsity(sparsity) + denser[name] - middle for name in shapes}
    # Not 0, so that a share of 0 for all of them is no division by 0.
    weights = {n: sizes[n] * Fraction(max(share, _TINY)) for n, share in kept.items()}
    return _shared_out(shapes, sparsity, 1.0, weights)


def _weighed(shapes: Shapes, weigh: Callable[[tuple[int, ...]], int]) -> dict[str, int | Fraction]:
    return {name: weigh(tuple(shape)) for name, shape in shapes.items()}


def _edges(shape: tuple[int, ...]) -> int:
    """Return numel * (n_out + n_in) / (n_out * n_in)."""
    if len(shape) < 2:
        return math.prod(shape)
    return (shape[0] + shape[1]) * math.prod(shape[2:])


def _shared_out(
    shapes: Shapes, sparsity: float, max_sparsity: Floors, weights: Mapping[str, int | Fraction]
) -> dict[str, float]:
    """Return sparsities that keep entries in proportion to `weights`, within the bounds."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = num_kept(sum(sizes.values()), check_sparsity(sparsity))
    floors = _floors(sizes, max_sparsity)
    check_floors(floors.values(), sum(sizes.values()), sparsity)
    kept = _rounded(_proportional(weights, floors, sizes, total), total)
    return {name: 1 - kept[name] / size if size else 0.0 for name, size in sizes.items()}


def _floors(sizes: Mapping[str, int], max_sparsity: Floors) -> dict[str, int]:
    """Return how many entries each tensor must keep at least."""
    if not isinstance(max_sparsity, Mapping):
        most = check_sparsity(max_sparsity, "max_sparsity")
        return {name: least_kept(size, most) for name, size in sizes.items()}
    unknown = max_sparsity.keys() - sizes.keys()
    if unknown:
        raise ValueError(
            f"`max_sparsity` must have names of tensors of this rule, {listed(sizes)}; got "
            f"{listed(sorted(unknown))}."
        )
    shares = {n: check_sparsity(s, f"max_sparsity of {n}") for n, s in max_sparsity.items()}
    return {name: least_kept(size, shares.get(name, 1.0)) for name, size in sizes.items()}


def _proportional(
    weights: Mapping[str, int | Fraction],
    floors: Mapping[str, int],
    sizes: Mapping[str, int],
    total: int,
) -> dict[str, Fraction]:
    """Return x with x = clamp(e * weight, floor, size) for one number e, and sum(x) = total.

    Fractions, because floats lose single entries. Each round fixes the tensors beyond the bound
    that is violated more; they are at this bound in the solution too.
    """
    fixed: dict[str, Fraction] = {name: Fraction(0) for name, size in sizes.items() if size == 0}
    while free := [name for name in sizes if name not in fixed]:
        scale = (total - sum(fixed.values())) / Fraction(sum(weights[name] for name in free))
        wanted = {name: scale * weights[name] for name in free}
        over = {name: Fraction(sizes[name]) for name in free if wanted[name] > sizes[name]}
        under = {name: Fraction(floors[name]) for name in free if wanted[name] < floors[name]}
        if not over and not under:
            return fixed | wanted
        excess = sum(wanted[name] - bound for name, bound in over.items())
        lack = sum(bound - wanted[name] for name, bound in under.items())
        fixed |= over if excess >= lack else {}
        fixed |= under if lack >= excess else {}
    return fixed


def _rounded(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Return integers that sum to `total`; the largest fractional parts are rounded up."""
    whole = {name: math.floor(share) for name, share in shares.items()}
    by_fraction = sorted(shares, key=lambda name: whole[name] - shares[name])
    for name in by_fraction[: total - sum(whole.values())]:
        whole[name] += 1
    return whole
