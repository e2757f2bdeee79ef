"""The kinds of gates: how the logits of a `SoftMask` mask a tensor. One class each.

A kind holds settings only. The logits, the temperature and so on are in the `SoftMask`, which every
method gets; the formulas are the functions of `parasparse.gates`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from parasparse import gates
from parasparse.counts import check_sparsity
from parasparse.masks.apply import apply_mask

_FAR = 20.0  # a logit that is open or closed for good
_RELEVANT = 3.0  # log alpha up to which a weight counts as more than noise: alpha = 20


class Gated(Protocol):
    """What a kind sees of its `SoftMask`."""

    logits: nn.Parameter
    init: float
    hard: bool
    temperature: Tensor
    sparsity: Tensor

    @property
    def mask(self) -> Tensor:
        """What multiplies the tensor now, but for noise."""

    def spread(self, values: Tensor) -> Tensor:
        """Return the value of its unit for each entry."""

    def pooled(self, keep: Tensor) -> Tensor:
        """Return whether any entry of each unit is kept."""


class GateKind(ABC):
    """How a `SoftMask` masks. For a gate that multiplies, derive from `ProductGate` instead.

    Attributes:
        init: what all logits are at first.
        draws: it draws noise at each read in training mode.
        takes_sparsity: a `sparsity` must be given, and is a buffer of the `SoftMask`.
        takes_units: a pattern of units may share each logit.
    """

    init: ClassVar[float] = 0.0
    draws: ClassVar[bool] = False
    takes_sparsity: ClassVar[bool] = False
    takes_units: ClassVar[bool] = True

    def check_init(self, init: float, dtype: torch.dtype) -> None:  # noqa: B027 - optional
        """Raise ValueError if logits of `dtype` must not all be `init` at first."""

    def buffers(self, logits: Tensor, sparsity: float | None) -> dict[str, Tensor]:
        """Return the numbers that belong to the state, scalar tensors by name."""
        if sparsity is None:
            return {}
        share = torch.tensor(check_sparsity(sparsity), dtype=torch.float64)
        return {"sparsity": share.to(logits.device)}

    def noise(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the noise of one read; of a kind that draws."""
        raise NotImplementedError

    @abstractmethod
    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return `weight` through the gate, with noise or without."""

    @abstractmethod
    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the penalty, a scalar with its graph."""

    @abstractmethod
    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        """Return what to store so that open entries read as `value`, and closed ones stay."""

    @abstractmethod
    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor | None:
        """Return what multiplies `weight` once the gate is pruned; None if it only subtracts."""

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:  # noqa: B027 - optional
        """Fix the gate after it has been folded into the weight; see `SoftMask.fold_`."""


class ProductGate(GateKind):
    """A gate that multiplies by something that does not depend on the tensor.

    A gate of your own overrides `multiplier`, and what else differs.

    Examples:
        >>> class Squared(ProductGate):
        ...     init = 1.0
        ...
        ...     def multiplier(self, mask, noise):
        ...         return mask.logits.square()
        >>> SoftMask(torch.ones(2), gate=Squared())(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """

    @abstractmethod
    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return the mask, of the shape of `mask.logits`."""

    def value(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return the mask, of the shape of the logits; 0 or 1 after it has been folded."""
        if mask.hard:
            return (mask.logits > 0).to(mask.logits.dtype)
        return self.multiplier(mask, noise)

    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return `weight` times the mask; +0.0 where a hard one is closed."""
        value = mask.spread(self.value(mask, noise))
        return apply_mask(weight, value) if mask.hard else weight * value.to(mask.logits.dtype)

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the sum of the mask."""
        return mask.mask.sum()

    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        """Return `value` divided by the mask where it is open."""
        multiplier = mask.mask
        more = value.to(stored) / multiplier
        # Divided by a gate that is all but closed, a value overflows.
        can = (multiplier != 0) & (more.isfinite() | ~value.isfinite())
        return torch.where(can, more, stored)

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor | None:
        """Return the mask, 0 where it is not above `threshold`."""
        return mask.mask if threshold is None else mask.mask * (mask.mask > threshold)

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        """Make the mask 1 where it is open, or where `keep` says so, and 0 elsewhere."""
        units = mask.pooled(mask.mask != 0 if keep is None else keep)
        mask.logits.copy_(torch.where(units, _FAR, -_FAR))
        mask.hard, mask.init = True, math.inf


@dataclass(frozen=True)
class Sigmoid(ProductGate):
    """Continuous Sparsification: `gates.sigmoid`, which a temperature hardens."""

    def check_init(self, init: float, dtype: torch.dtype) -> None:
        """Refuse an `init` whose sigmoid, by which masks are divided, is 0."""
        if torch.tensor(init, dtype=dtype, device="cpu").sigmoid() == 0:
            raise ValueError(
                f"`init` must have a sigmoid over 0 in {dtype}, by which masks are divided; got "
                f"{init}."
            )

    def buffers(self, logits: Tensor, sparsity: float | None) -> dict[str, Tensor]:
        """Return the temperature."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return {"temperature": torch.ones((), dtype=wide, device=logits.device)}

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return sigmoid(T s) / sigmoid(s0), or its limit."""
        return gates.sigmoid(mask.logits, mask.temperature, init=mask.init, hard=mask.hard)

    def value(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return the same: its limit has the scale 1 / sigmoid(s0)."""
        return self.multiplier(mask, noise)

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor:
        """Return the limit: logits above `threshold` (None: 0) are open."""
        moved = mask.logits - (threshold or 0.0)
        return mask.spread(gates.sigmoid(moved, init=mask.init, hard=True))


@dataclass(frozen=True)
class HardConcrete(ProductGate):
    """L0 regularisation: `gates.hard_concrete`, whose arguments these are.

    Attributes:
        temperature: beta > 0.
        low: gamma < 0.
        high: zeta > 1.
    """

    init: ClassVar[float] = 2.0  # open with probability 0.97
    draws: ClassVar[bool] = True
    temperature: float = 2 / 3
    low: float = -0.1
    high: float = 1.1

    def noise(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return uniform numbers, one for each logit."""
        wide = torch.promote_types(mask.logits.dtype, torch.float32)  # half draws 0 too often
        return torch.rand_like(mask.logits, dtype=wide)

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return the stretched sigmoid, cut off at 0 and 1."""
        return gates.hard_concrete(
            mask.logits, noise, temperature=self.temperature, low=self.low, high=self.high
        )

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the number of entries that are expected not to be 0."""
        open_ = gates.hard_concrete_penalty(
            mask.logits, temperature=self.temperature, low=self.low, high=self.high
        )
        return mask.spread(open_).sum()


@dataclass(frozen=True)
class StraightThrough(ProductGate):
    """Movement pruning: `gates.straight_through`, the highest scores."""

    takes_sparsity: ClassVar[bool] = True

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return 1 for the highest scores, 0 for the others."""
        return gates.straight_through(mask.logits, mask.sparsity)

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the sum of sigmoid(scores)."""
        return mask.spread(torch.sigmoid(mask.logits)).sum()

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor:
        """Return 1 for scores above `threshold`; None: for the highest."""
        if threshold is None:
            return mask.mask
        return mask.spread((mask.logits > threshold).to(mask.logits.dtype))

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        """Set the sparsity to what is kept as well."""
        units = mask.pooled(mask.mask != 0 if keep is None else keep)
        super().fold_(mask, keep)
        mask.sparsity.fill_(1 - float(units.double().mean()))


@dataclass(frozen=True)
class SoftThreshold(GateKind):
    """STR: `gates.soft_threshold`, which subtracts a learned threshold."""

    init: ClassVar[float] = -10.0  # |w| - 4.5e-5

    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return `weight`, less the threshold."""
        return gates.soft_threshold(weight, mask.spread(mask.logits))

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return 0: weight decay on the logits takes its part."""
        return mask.logits.new_zeros(())

    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        """Return `value` and the threshold; what reads as 0 already stays."""
        threshold = torch.sigmoid(mask.spread(mask.logits))
        more = value + value.sgn() * threshold
        stays = (value == 0) & (stored.abs() <= threshold)
        return torch.where(stays, stored, more.to(stored))

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> None:
        """Return None: it only subtracts."""
        return

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        """Make the threshold 0."""
        mask.logits.fill_(-math.inf)


@dataclass(frozen=True)
class VariationalDropout(GateKind):
    """Variational dropout: `gates.variational_dropout`, noise whose variance is learned."""

    init: ClassVar[float] = -10.0  # variance 4.5e-5
    draws: ClassVar[bool] = True
    takes_units: ClassVar[bool] = False

    def noise(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return normal numbers, one for each entry."""
        return torch.randn_like(weight)

    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return `weight` with noise; +0.0 where it is irrelevant, if hard."""
        if mask.hard:
            return apply_mask(weight, _relevant(mask, weight))
        return gates.variational_dropout(weight, mask.logits, noise)

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the KL divergence."""
        relevance = gates.log_alpha(weight, mask.logits)
        is_complex = weight.is_complex()
        return gates.variational_dropout_penalty(relevance, is_complex=is_complex).sum()

    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        """Return `value`; what is irrelevant reads as 0 whatever its value."""
        return torch.where(_relevant(mask, stored), value, stored) if mask.hard else value

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor:
        """Return 1 where log alpha is at most `threshold` (None: 3)."""
        return _relevant(mask, weight, threshold).to(mask.logits.dtype)


@dataclass(frozen=True)
class Multiplier(ProductGate):
    """A function of the logits as a gate."""

    function: Callable[[Tensor], Tensor]

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return the function of the logits."""
        return self.function(mask.logits)


def _relevant(mask: Gated, weight: Tensor, threshold: float | None = None) -> Tensor:
    limit = _RELEVANT if threshold is None else threshold
    return gates.log_alpha(weight.detach(), mask.logits.detach()) <= limit


KINDS: dict[Callable[..., Tensor], GateKind] = {
    gates.sigmoid: Sigmoid(),
    gates.hard_concrete: HardConcrete(),
    gates.straight_through: StraightThrough(),
    gates.soft_threshold: SoftThreshold(),
    gates.variational_dropout: VariationalDropout(),
}


def as_kind(gate: Callable[..., Tensor] | GateKind) -> GateKind:
    """Return the kind of a gate that is given as such, or as a function.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(gate, GateKind):
        return gate
    if not callable(gate) or isinstance(gate, type):
        known = ", ".join(f"gates.{function.__name__}" for function in KINDS)
        raise TypeError(
            f"`gate` must be one of {known}, a `GateKind`, or a function from logits to a mask; "
            f"got {gate!r}."
        )
    return KINDS.get(gate) or Multiplier(gate)
