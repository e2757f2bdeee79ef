"""Published methods of dynamic sparse training, each a `DynamicSparsity` with its settings."""

from collections.abc import Callable

import torch
from torch import nn

from parasparse.rules.types import Rules
from parasparse.schedules import Cosine, Every
from parasparse.training.dynamic.controller import DynamicSparsity
from parasparse.training.dynamic.start import Init


def sparse_evolutionary_training(
    model: nn.Module,
    rules: Rules,
    optimizer: torch.optim.Optimizer,
    *,
    every: int | Callable[[int], bool] | None = None,
    prune_rate: float = 0.3,
    init: Init = "linear",
) -> DynamicSparsity:
    """Return SET: the positive and negative weights closest to 0 go, random ones come.

    Args:
        model: changed in place.
        rules: as for `DynamicSparsity`.
        optimizer: any; momentum is not needed.
        every: update at each so-many-th step; None: call `at_end_of_epoch()`, as the paper does,
            besides `step()` after each step.
        prune_rate: zeta.
        init: the paper's Erdos-Renyi masks.

    Examples:
        >>> model = nn.Linear(20, 20)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> sparse_evolutionary_training(model, 0.9, optimizer).baseline_nonzero
        40

    Reference: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
        Connectivity", 2018, arXiv:1707.04780, algorithm 1.
    """
    return DynamicSparsity(
        model, rules, optimizer, prune="SET", growth="random", redistribution="none",
        prune_rate=prune_rate, every=every, init=init,
    )  # fmt: skip


def rigl(
    model: nn.Module,
    rules: Rules,
    optimizer: torch.optim.Optimizer,
    *,
    stop: int,
    every: int = 100,
    prune_rate: float = 0.3,
    init: Init = "erk",
) -> DynamicSparsity:
    """Return RigL: the smallest weights go, those with the largest dense gradient come.

    Args:
        model: changed in place.
        rules: as for `DynamicSparsity`.
        optimizer: any; momentum is not needed.
        stop: T_end, the step after which masks stay; 3/4 of the training in the paper.
        every: Delta T, steps from one update to the next.
        prune_rate: alpha, which falls to 0 at `stop` along a cosine.
        init: the paper's Erdos-Renyi-Kernel masks, or its "constant".

    Examples:
        >>> model = nn.Linear(20, 20)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> rigl(model, 0.9, optimizer, stop=750).baseline_nonzero
        40

    Reference: Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, algorithm 1. Differs: a
        layer with less than 20 % zeros loses at most its sparsity (see `DynamicSparsity`).
    """
    return DynamicSparsity(
        model, rules, optimizer, prune="magnitude", growth="gradient", redistribution="none",
        prune_rate=Cosine(prune_rate, 0.0, stop=stop), every=Every(every, stop=stop),
        init=init,
    )  # fmt: skip


def sparse_momentum(
    model: nn.Module,
    rules: Rules,
    optimizer: torch.optim.Optimizer,
    *,
    stop: int,
    every: int | Callable[[int], bool] | None = None,
    prune_rate: float = 0.5,
    init: Init = "constant",
) -> DynamicSparsity:
    """Return sparse momentum: layers and entries with the largest mean |momentum| grow.

    Args:
        model: changed in place.
        rules: as for `DynamicSparsity`.
        optimizer: keeps a momentum.
        stop: the step at which the prune rate is 0: the end of training in the paper.
        every: update at each so-many-th step; None: call `at_end_of_epoch()`, as the paper does,
            besides `step()` after each step.
        prune_rate: at first; falls to 0 at `stop` along a cosine.
        init: the paper's masks of one sparsity.

    Examples:
        >>> model = nn.Linear(20, 20)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> sparse_momentum(model, 0.9, optimizer, stop=1_000).baseline_nonzero
        40

    Reference: Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without
        Losing Performance", 2019, arXiv:1907.04840, section 3.
    """
    return DynamicSparsity(
        model, rules, optimizer, prune="magnitude", growth="momentum", redistribution="momentum",
        prune_rate=Cosine(prune_rate, 0.0, stop=stop), every=every, init=init,
    )  # fmt: skip
