"""Published methods of dynamic sparse training, as settings of `DynamicSparsity`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from parasparse.optim import Optimizers
from parasparse.rules.types import Rules
from parasparse.schedules import Cosine, Every
from parasparse.training.dynamic.controller import DynamicSparsity
from parasparse.training.dynamic.start import Init


def sparse_evolutionary_training(
    model: nn.Module, rules: Rules, optimizer: Optimizers, *,
    every: int | Callable[[int], bool] | None = None, prune_rate: float = 0.3,
    init: Init = "linear",
) -> DynamicSparsity:  # fmt: skip
    """Return SET: drops the positive and negative weights closest to 0 and grows random ones.

    Args:
        model: is changed in place.
        rules: as in `DynamicSparsity`.
        optimizer: any; momentum is not needed.
        every: number of steps between updates; None: call `at_end_of_epoch()` as in the paper, in
            addition to `step()`.
        prune_rate: zeta, the share of connections that an update drops, in [0, 1].
        init: how the first masks are drawn; "linear" is the paper's Erdos-Renyi.

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
    model: nn.Module, rules: Rules, optimizer: Optimizers, *,
    stop: int, every: int = 100, prune_rate: float = 0.3, init: Init = "erk",
) -> DynamicSparsity:  # fmt: skip
    """Return RigL: drops the smallest weights and grows those with the largest dense gradient.

    Args:
        model: is changed in place.
        rules: as in `DynamicSparsity`.
        optimizer: any; momentum is not needed.
        stop: T_end, the step after which masks stay fixed; 3/4 of the training in the paper.
        every: Delta T, the number of steps between updates.
        prune_rate: alpha, in [0, 1]; it falls to 0 at `stop` along a cosine.
        init: how the first masks are drawn; "erk" or "constant" in the paper.

    Examples:
        >>> model = nn.Linear(20, 20)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> rigl(model, 0.9, optimizer, stop=750).baseline_nonzero
        40

    Reference: Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, algorithm 1. Differs: a
        layer with less than 20% zeros drops at most its sparsity (see `DynamicSparsity`).
    """
    return DynamicSparsity(
        model, rules, optimizer, prune="magnitude", growth="gradient", redistribution="none",
        prune_rate=Cosine(prune_rate, 0.0, stop=stop), every=Every(every, stop=stop), init=init,
    )  # fmt: skip


def sparse_momentum(
    model: nn.Module, rules: Rules, optimizer: Optimizers, *,
    stop: int, every: int | Callable[[int], bool] | None = None, prune_rate: float = 0.5,
    init: Init = "constant",
) -> DynamicSparsity:  # fmt: skip
    """Return sparse momentum: layers and entries with the largest |momentum| grow.

    Args:
        model: is changed in place.
        rules: as in `DynamicSparsity`.
        optimizer: must keep momentum.
        stop: the step at which the prune rate reaches 0; the end of training in the paper.
        every: number of steps between updates; None: call `at_end_of_epoch()` as in the paper, in
            addition to `step()`.
        prune_rate: in [0, 1]; it falls to 0 at `stop` along a cosine.
        init: how the first masks are drawn; "constant" in the paper.

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
