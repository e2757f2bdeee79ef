"""The three moves of dynamic sparse training: prune, grow, and redistribute between layers.

Each is an ordinary function; your own moves have the same signatures:

    redistribution(masking, name, weight, mask) -> importance of the layer, a number
    prune(masking, mask, weight, name) -> new mask; keeps a part of `mask` (float, 0 and 1)
    growth(masking, name, new_mask, total_regrowth, weight) -> newer mask; keeps all of `new_mask`

or, for all layers at once, with new masks written to `masking.masks`:

    prune(masking) -> number removed
    growth(masking, total_regrowth) -> number of connections afterwards

`masking` is a `Masking` (training/dynamic/view.py). `weight` is 0 where `mask` is 0.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parasparse.dtypes import total
from parasparse.patterns.selection.kth import highest
from parasparse.sharding.dtensors import (
    count_nonzero,
    full_tensor,
    laid_out_like,
    sum_over_shards,
    to_local,
)
from parasparse.training.dynamic.view import Masking, needs


@needs("weights")
def magnitude_prune(masking: Masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the ceil(rate * connections) with the smallest |w|.

    Reference: Mocanu et al., 2018, arXiv:1707.04780; Dettmers & Zettlemoyer, 2019,
        arXiv:1907.04840, section 3.
    """
    kept = mask != 0
    return _best(weight.detach().abs(), kept, count_nonzero(kept) - _removed(masking, name))


@needs("weights")
def set_prune(masking: Masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop ceil(rate * connections): the positive and the negative weights closest to 0.

    Half of them are positive; if one sign has too few, the other gives more. Zeros and complex
    weights count as positive.

    Reference: Mocanu et al., 2018, arXiv:1707.04780, algorithm 1, lines 8 and 9.
    """
    kept = mask != 0
    size = weight.detach().abs()
    below = torch.zeros_like(kept) if weight.is_complex() else weight < 0
    positive, negative = kept & ~below, kept & below
    positives, negatives = count_nonzero(positive), count_nonzero(negative)
    removed = _removed(masking, name)
    of_positive = min(removed - min(removed // 2, negatives), positives)
    kept_positive = _best(size, positive, positives - of_positive)
    return kept_positive | _best(size, negative, negatives - (removed - of_positive))


@needs("weights")
def random_growth(
    masking: Masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor
) -> Tensor:
    """Add exactly `total_regrowth` free entries, drawn uniformly.

    Reference: Mocanu et al., 2018, arXiv:1707.04780, algorithm 1, line 10.
    """
    return new_mask | _best(_draws(masking, weight), ~new_mask, total_regrowth)


@needs("momentum")
def momentum_growth(
    masking: Masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor
) -> Tensor:
    """Add the free entries with the largest |momentum|.

    Reference: Dettmers & Zettlemoyer, 2019, arXiv:1907.04840, section 3.
    """
    return new_mask | _best(_momentum(masking, weight), ~new_mask, total_regrowth)


@needs("gradient")
def gradient_growth(
    masking: Masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor
) -> Tensor:
    """Add the free entries with the largest |gradient| of the dense weight at this step.

    Reference: Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, section 3 (4).
    """
    return new_mask | _best(_gradient(masking, weight), ~new_mask, total_regrowth)


@needs("momentum")
def momentum_neuron_growth(
    masking: Masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor
) -> Tensor:
    """Distribute growth over outputs by mean |momentum|, and add the largest |momentum| in each.

    Differs: in sparse_learning, growth that does not fit into an output is lost; here it goes to
        the others.
    """
    size = full_tensor(_momentum(masking, weight)).reshape(len(weight), -1)
    free = ~full_tensor(new_mask).reshape(size.shape)
    room = free.sum(1).tolist()
    shares = shared_out(total_regrowth, size.float().mean(1).tolist(), room)
    order = torch.where(free, size, -1.0).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(size.shape[1], device=size.device).expand_as(size)
    rank = torch.empty_like(order).scatter_(1, order, places)
    grown = rank < torch.tensor(shares, device=size.device)[:, None]
    return new_mask | laid_out_like(grown.view(new_mask.shape), new_mask)


@needs("momentum")
def momentum_redistribution(masking: Masking, name: str, weight: Tensor, mask: Tensor) -> float:
    """Return the mean |momentum| of the connections, 0 without connections.

    Reference: Dettmers & Zettlemoyer, 2019, arXiv:1907.04840, section 3.
    """
    return _mean(_momentum(masking, weight), mask)


@needs("weights")
def magnitude_redistribution(masking: Masking, name: str, weight: Tensor, mask: Tensor) -> float:
    """Return the mean |w| of the connections, 0 without connections."""
    return _mean(weight.detach().abs(), mask)


@needs("weights")
def nonzero_redistribution(masking: Masking, name: str, weight: Tensor, mask: Tensor) -> float:
    """Return the number of connections."""
    return float(count_nonzero(mask))


@needs("weights")
def no_redistribution(masking: Masking, name: str, weight: Tensor, mask: Tensor) -> float:
    """Return the number of connections that the layer will drop; each layer regrows as many."""
    return float(_removed(masking, name))


@needs("weights")
def global_magnitude_prune(masking: Masking) -> int:
    """Drop the ceil(rate * connections) with the smallest |w| of all layers together."""
    every = sum(masking.name2nonzeros.values())
    removed = math.ceil(masking.prune_rate * every)
    scores = [
        torch.where(masking.masks[name], weight.detach().abs().double(), -1.0)
        for name, weight in masking.weights.items()
    ]
    for name, kept in zip(masking.weights, highest(scores, every - removed), strict=True):
        masking.masks[name] = kept
    return removed


@needs("momentum")
def global_momentum_growth(masking: Masking, total_regrowth: int) -> int:
    """Add the free entries with the largest |momentum| of all layers together."""
    scores = [
        torch.where(masking.masks[name], -1.0, _momentum(masking, weight).double())
        for name, weight in masking.weights.items()
    ]
    for name, grown in zip(masking.weights, highest(scores, total_regrowth), strict=True):
        masking.masks[name] = masking.masks[name] | grown
    return sum(count_nonzero(mask) for mask in masking.masks.values())


def shared_out(total: int, importance: list[float], room: list[int]) -> list[int]:
    """Return integer shares of `total` in proportion to `importance` >= 0, at most `room` each.

    Any excess over `room` is spread evenly over the others; `total` is at most the sum of `room`.
    The largest remainders are rounded up, the first of equal ones. If all importance is 0, shares
    are in proportion to `room`.

    Examples:
        >>> shared_out(10, [1.0, 1.0, 2.0], [100, 1, 100])
        [3, 1, 6]
    """
    weights = importance if sum(importance) else [float(space) for space in room]
    wanted = [total * weight / (sum(weights) or 1) for weight in weights]
    while True:
        open_ = [i for i, space in enumerate(room) if wanted[i] < space]
        excess = total - sum(min(want, space) for want, space in zip(wanted, room, strict=True))
        if not open_ or excess < 1e-9 * max(total, 1):
            break
        for i in open_:
            wanted[i] += excess / len(open_)
    shares = [min(math.floor(want), space) for want, space in zip(wanted, room, strict=True)]
    by_remainder = sorted(
        (i for i in range(len(room)) if shares[i] < room[i]), key=lambda i: shares[i] - wanted[i]
    )
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _draws(masking: Masking, weight: Tensor) -> Tensor:
    # Each process draws all of them; `same_draws` has given all generators the same state.
    draws = torch.rand(weight.shape, device=weight.device, dtype=torch.float32)
    return laid_out_like(draws, weight)


def _momentum(masking: Masking, weight: Tensor) -> Tensor:
    return masking.get_momentum_for_weight(weight).abs()


def _gradient(masking: Masking, weight: Tensor) -> Tensor:
    return masking.get_gradient_for_weight(weight).abs()


def _removed(masking: Masking, name: str) -> int:
    return math.ceil(masking.name2prune_rate[name] * masking.name2nonzeros[name])


def _best(scores: Tensor, among: Tensor, kept: int) -> Tensor:
    """Return the `kept` entries of `among` with the highest scores, which are >= 0."""
    if kept <= 0:
        return torch.zeros_like(among)
    (best,) = highest([torch.where(among, scores, -1.0)], min(kept, count_nonzero(among)))
    return best


def _mean(values: Tensor, mask: Tensor) -> float:
    kept = count_nonzero(mask)
    inside = total(to_local(values)[to_local(mask) != 0])
    return float(sum_over_shards(inside, values)) / kept if kept else 0.0


# The moves by the names that `DynamicSparsity` accepts.
PRUNE: dict[str, Callable[..., Any]] = {
    "magnitude": magnitude_prune, "SET": set_prune, "global_magnitude": global_magnitude_prune,
}  # fmt: skip
GROWTH: dict[str, Callable[..., Any]] = {
    "random": random_growth, "momentum": momentum_growth, "gradient": gradient_growth,
    "momentum_neuron": momentum_neuron_growth, "global_momentum_growth": global_momentum_growth,
}  # fmt: skip
REDISTRIBUTION: dict[str, Callable[..., Any]] = {
    "momentum": momentum_redistribution, "magnitude": magnitude_redistribution,
    "nonzero": nonzero_redistribution, "none": no_redistribution,
}  # fmt: skip
# Growth functions that can also grow within the groups of an n:m pattern, with their scores.
GROWTH_SCORES: dict[Callable[..., Any], Callable[[Masking, Tensor], Tensor]] = {
    random_growth: _draws, momentum_growth: _momentum, gradient_growth: _gradient,
}  # fmt: skip
