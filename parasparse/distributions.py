"""Distributions: shapes and one sparsity in, a sparsity for each tensor out.

A distribution is any callable `(shapes by name, sparsity) -> sparsity by name`. The distributions
below keep exactly `num_kept(n, sparsity)` of the n entries of all tensors. With a pattern of units
(blocks, channels, heads), sparsities count units instead.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from parasparse.counts import check_floors, check_sparsity, least_kept, num_kept
from parasparse.text import listed

Shapes = Mapping[str, tuple[int, ...]]
Floors = float | Mapping[str, float]


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
    return _shared_out(shapes, sparsity, max_sparsity, math.prod)


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
    return _shared_out(shapes, sparsity, max_sparsity, _edges)


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
    return _shared_out(shapes, sparsity, max_sparsity, lambda shape: sum(shape) if shape else 1)


def _edges(shape: tuple[int, ...]) -> int:
    """Return numel * (n_out + n_in) / (n_out * n_in)."""
    if len(shape) < 2:
        return math.prod(shape)
    return (shape[0] + shape[1]) * math.prod(shape[2:])


def _shared_out(
    shapes: Shapes, sparsity: float, max_sparsity: Floors, weigh: Callable[[tuple[int, ...]], int]
) -> dict[str, float]:
    """Return sparsities that keep entries in proportion to `weigh(shape)`, within the bounds."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = num_kept(sum(sizes.values()), check_sparsity(sparsity))
    floors = _floors(sizes, max_sparsity)
    check_floors(floors.values(), sum(sizes.values()), sparsity)
    weights = {name: weigh(tuple(shape)) if sizes[name] else 0 for name, shape in shapes.items()}
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
    weights: Mapping[str, int], floors: Mapping[str, int], sizes: Mapping[str, int], total: int
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
