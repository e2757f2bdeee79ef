"""The kinds of gates: one class for each way in which the logits of a `SoftMask` mask a tensor.

A kind has settings only. The `SoftMask`, which is passed to every method, has the logits and the
buffers, and `parasparse.gates` has the formulas.
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
from parasparse.dtypes import total
from parasparse.masks.apply import apply_mask

_FAR = 20.0  # the logit of a gate that stays open; -_FAR stays closed
_RELEVANT = 3.0  # the highest log alpha of a weight that is more than noise: alpha = 20


class Gated(Protocol):
    """The members of a `SoftMask` that its kind uses."""

    logits: nn.Parameter
    init: float
    hard: bool
    folded: bool
    temperature: Tensor
    sparsity: Tensor

    @property
    def mask(self) -> Tensor: ...
    def spread(self, values: Tensor) -> Tensor: ...
    def pooled(self, keep: Tensor) -> Tensor: ...


class GateKind(ABC):
    """Base class for kinds of gates. If the gate multiplies, derive from `ProductGate` instead.

    Attributes:
        init: the initial value of all logits.
        draws: whether each read in training mode draws noise.
        takes_sparsity: whether a `sparsity` is required, which becomes a buffer of the `SoftMask`.
        takes_units: whether the entries of a unit may share a logit.
    """

    init: ClassVar[float] = 0.0
    draws: ClassVar[bool] = False
    takes_sparsity: ClassVar[bool] = False
    takes_units: ClassVar[bool] = True

    def check_init(self, init: float, dtype: torch.dtype) -> None:  # noqa: B027 - optional
        """Raise ValueError if logits of `dtype` must not start at `init`."""

    def buffers(self, logits: Tensor, sparsity: float | None) -> dict[str, Tensor]:
        """Return the scalar tensors that the `SoftMask` registers as buffers, by name."""
        if sparsity is None:
            return {}
        share = torch.tensor(check_sparsity(sparsity), dtype=torch.float64)
        return {"sparsity": share.to(logits.device)}

    def noise(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the noise for one read. Only called if `draws` is True."""
        raise NotImplementedError(f"{type(self).__name__} draws noise, so it must override `noise`")

    @abstractmethod
    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return the masked `weight`; `noise` is None outside of training."""

    @abstractmethod
    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the penalty, a differentiable scalar."""

    @abstractmethod
    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        """Return the tensor to store, so that open entries read as `value` and closed ones stay."""

    @abstractmethod
    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor | None:
        """Return the mask after pruning the gate, or None if the gate does not multiply."""

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:  # noqa: B027 - optional
        """Fix the gate after it has been folded into the weight; see `SoftMask.fold_`."""


class ProductGate(GateKind):
    """Base class for gates that multiply by a mask that does not depend on the tensor.

    Override `multiplier`, and other methods where your gate differs.

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
        """Return the mask, in the shape of `mask.logits`."""

    def value(self, mask: Gated, noise: Tensor | None) -> Tensor:
        """Return `multiplier`, or 0 and 1 after the gate has been folded into the weight."""
        if mask.folded:
            return (mask.logits > 0).to(mask.logits.dtype)
        return self.multiplier(mask, noise)

    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        value = mask.spread(self.value(mask, noise))
        is_exact = mask.folded or mask.hard
        return apply_mask(weight, value) if is_exact else weight * value.to(mask.logits.dtype)

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the sum of the mask over all entries."""
        return total(mask.mask)

    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        multiplier = mask.mask
        divided = value.to(stored) / multiplier
        # A gate that is nearly closed makes the quotient overflow.
        fits = (multiplier != 0) & (divided.isfinite() | ~value.isfinite())
        return torch.where(fits, divided, stored)

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor | None:
        """Return the mask, with 0 where it is not above `threshold`."""
        return mask.mask if threshold is None else mask.mask * (mask.mask > threshold)

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        units = mask.pooled(mask.mask != 0 if keep is None else keep)
        mask.logits.copy_(torch.where(units, _FAR, -_FAR))
        mask.folded = True


@dataclass(frozen=True)
class Sigmoid(ProductGate):
    """Continuous Sparsification: `gates.sigmoid`, which a temperature hardens."""

    def check_init(self, init: float, dtype: torch.dtype) -> None:
        if torch.tensor(init, dtype=dtype, device="cpu").sigmoid() == 0:
            raise ValueError(
                f"`init` must have a sigmoid above 0 in {dtype}, because masks are divided by it; "
                f"got {init}."
            )

    def buffers(self, logits: Tensor, sparsity: float | None) -> dict[str, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return {"temperature": torch.ones((), dtype=wide, device=logits.device)}

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        return gates.sigmoid(mask.logits, mask.temperature, init=mask.init, hard=mask.hard)

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        super().fold_(mask, keep)
        mask.init = math.inf  # whose sigmoid, the divisor, is 1

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor:
        moved = mask.logits - (threshold or 0.0)
        return mask.spread(gates.sigmoid(moved, init=mask.init, hard=True))


@dataclass(frozen=True)
class HardConcrete(ProductGate):
    """L0 regularisation: `gates.hard_concrete`, with its arguments as fields."""

    init: ClassVar[float] = 2.0  # open with probability 0.97
    draws: ClassVar[bool] = True
    temperature: float = 2 / 3
    low: float = -0.1
    high: float = 1.1

    def noise(self, mask: Gated, weight: Tensor) -> Tensor:
        # Half precision would draw 0 too often.
        wide = torch.promote_types(mask.logits.dtype, torch.float32)
        return torch.rand_like(mask.logits, dtype=wide)

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        return gates.hard_concrete(
            mask.logits, noise, temperature=self.temperature, low=self.low, high=self.high
        )

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the expected number of entries that are not 0."""
        open_ = gates.hard_concrete_penalty(
            mask.logits, temperature=self.temperature, low=self.low, high=self.high
        )
        return total(mask.spread(open_))


@dataclass(frozen=True)
class StraightThrough(ProductGate):
    """Movement pruning: `gates.straight_through`, the highest scores."""

    takes_sparsity: ClassVar[bool] = True

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
        return gates.straight_through(mask.logits, mask.sparsity)

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the sum of sigmoid(scores) over all entries."""
        return total(mask.spread(torch.sigmoid(mask.logits)))

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor:
        if threshold is None:
            return mask.mask
        return mask.spread((mask.logits > threshold).to(mask.logits.dtype))

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        super().fold_(mask, keep)
        mask.sparsity.fill_(1 - float((mask.logits > 0).double().mean()))


@dataclass(frozen=True)
class SoftThreshold(GateKind):
    """STR: `gates.soft_threshold`, which subtracts a learned threshold."""

    init: ClassVar[float] = -10.0  # |w| - 4.5e-5

    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        return gates.soft_threshold(weight, mask.spread(mask.logits))

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return 0, because weight decay on the logits does this job."""
        return mask.logits.new_zeros(())

    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        threshold = torch.sigmoid(mask.spread(mask.logits))
        new = value + value.sgn() * threshold
        stays = (value == 0) & (stored.abs() <= threshold)
        return torch.where(stays, stored, new.to(stored))

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> None:
        return  # it subtracts

    def fold_(self, mask: Gated, keep: Tensor | None) -> None:
        mask.logits.fill_(-math.inf)


@dataclass(frozen=True)
class VariationalDropout(GateKind):
    """Variational dropout: `gates.variational_dropout`, noise whose variance is learned."""

    init: ClassVar[float] = -10.0  # variance 4.5e-5
    draws: ClassVar[bool] = True
    takes_units: ClassVar[bool] = False

    def noise(self, mask: Gated, weight: Tensor) -> Tensor:
        return torch.randn_like(weight)

    def apply(self, mask: Gated, weight: Tensor, noise: Tensor | None) -> Tensor:
        if mask.hard:
            return apply_mask(weight, _relevant(mask, weight))
        return gates.variational_dropout(weight, mask.logits, noise)

    def penalty(self, mask: Gated, weight: Tensor) -> Tensor:
        """Return the sum of KL divergences over all entries."""
        relevance = gates.log_alpha(weight, mask.logits)
        is_complex = weight.is_complex()
        return total(gates.variational_dropout_penalty(relevance, is_complex=is_complex))

    def merged(self, mask: Gated, value: Tensor, stored: Tensor) -> Tensor:
        return torch.where(_relevant(mask, stored), value, stored) if mask.hard else value

    def hardened(self, mask: Gated, weight: Tensor, threshold: float | None) -> Tensor:
        return _relevant(mask, weight, threshold).to(mask.logits.dtype)


@dataclass(frozen=True)
class Multiplier(ProductGate):
    """A gate whose mask is a function of the logits."""

    function: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def check(self, logits: Tensor) -> None:
        """Raise ValueError if the function does not return a mask for each of `logits`."""
        mask = self.function(logits)
        if not isinstance(mask, Tensor) or mask.shape != logits.shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(
                f"a function that is a gate must return a mask of the shape of the logits, "
                f"{tuple(logits.shape)}; got {got}."
            )

    def multiplier(self, mask: Gated, noise: Tensor | None) -> Tensor:
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
    """Return the kind of a gate that is a `GateKind` or a function, or raise TypeError."""
    if isinstance(gate, GateKind):
        return gate
    if not callable(gate) or isinstance(gate, type):
        known = ", ".join(f"gates.{function.__name__}" for function in KINDS)
        raise TypeError(
            f"`gate` must be one of {known}, a `GateKind` instance, or a function from logits to a "
            f"mask; got {gate!r}."
        )
    kinds = [kind for function, kind in KINDS.items() if function is gate]
    return kinds[0] if kinds else Multiplier(gate)
