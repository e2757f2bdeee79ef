"""The module of a learned soft mask: one of the gates, its parameters, its penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import gates
from parasparse.counts import check_sparsity
from parasparse.masks.apply import apply_mask
from parasparse.patterns.units import Units, has_units

# What all parameters of a gate are at first.
INIT: dict[Callable[..., Tensor], float] = {
    gates.sigmoid: 0.0,  # w
    gates.hard_concrete: 2.0,  # open with probability 0.97
    gates.straight_through: 0.0,
    gates.soft_threshold: -10.0,  # |w| - 4.5e-5
    gates.variational_dropout: -10.0,  # variance 4.5e-5
}
_FAR = 20.0  # a logit that is open or closed for good
_RELEVANT = 3.0  # log alpha up to which a weight counts as more than noise: alpha = 20


class SoftMask(nn.Module):
    """A gate with learned parameters between a stored tensor and its reader.

    Attributes:
        logits: a Parameter, all `init` at first: the logits or scores of the gate, the logit of its
            threshold, or the log variance. Real, of the tensor's shape or one for each unit.
        gate: the function of `gates`.
        hard: what the trained network is pruned to, where that differs: the limit of `sigmoid`,
            which trains no logits; weights with log alpha above 3 are 0 for `variational_dropout`.
            Not in the state.
        temperature: T of `sigmoid`, a scalar tensor buffer, so that changing it
            (`temperature.fill_`) compiles nothing anew.
        sparsity: of `straight_through`, the same.

    Args:
        like: the tensor to be masked; gives shape, dtype, device and memory format.
        gate: one of `gates.sigmoid`, `hard_concrete`, `straight_through`, `soft_threshold`,
            `variational_dropout`. The second and the last draw noise at each reading in training
            mode, and none in evaluation.
        init: None: 0; 2 for `hard_concrete`, -10 for the last two.
        pattern: of units, each of which has one logit; None: each entry has its own.
        sparsity: share of zeros of `straight_through`.

    Examples:
        >>> SoftMask(torch.ones(2))(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]

    Reference: see each gate.
    """

    temperature: Tensor
    sparsity: Tensor

    def __init__(
        self,
        like: Tensor,
        *,
        gate: Callable[..., Tensor] = gates.sigmoid,
        init: float | None = None,
        pattern: Units | None = None,
        sparsity: float | None = None,
    ) -> None:
        super().__init__()
        if gate not in INIT:
            known = ", ".join(f"gates.{function.__name__}" for function in INIT)
            raise ValueError(f"`gate` must be one of {known}; got {gate!r}.")
        if (sparsity is not None) != (gate is gates.straight_through):
            raise ValueError("`sparsity` must be given with `straight_through`, and only there.")
        if pattern is not None and (not has_units(pattern) or gate is gates.variational_dropout):
            raise ValueError(
                f"`pattern` must be one of units, each with its own logit; got {pattern!r} for "
                f"{gate.__name__}."
            )
        self.gate, self.pattern, self.hard = gate, pattern, False
        self.init = INIT[gate] if init is None else init
        self._shape = like.shape
        dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        at_first = torch.tensor(self.init, dtype=dtype, device="cpu").sigmoid()
        if gate is gates.sigmoid and at_first == 0:
            raise ValueError(
                f"`init` must have a sigmoid over 0 in {dtype}, by which masks are divided; got "
                f"{self.init}."
            )
        whole = torch.full_like(like, self.init, dtype=dtype, requires_grad=False)
        if pattern is not None:
            units = pattern.pool(torch.zeros(like.shape, device="cpu")).shape  # meta has no values
            whole = torch.full(units, self.init, dtype=dtype, device=like.device)
        self.logits = nn.Parameter(whole)
        if gate is gates.sigmoid:
            wide = torch.promote_types(dtype, torch.float32)
            self.register_buffer("temperature", torch.ones((), dtype=wide, device=like.device))
        if sparsity is not None:
            share = torch.tensor(check_sparsity(sparsity), dtype=torch.float64)
            self.register_buffer("sparsity", share.to(like.device))

    @property
    def mask(self) -> Tensor:
        """What multiplies the tensor now, but for noise; not there where the gate adds."""
        if not self.is_product:
            raise AttributeError(f"{self.gate.__name__} is no product with a mask")
        return self._multiplier(None)

    @property
    def is_product(self) -> bool:
        """Whether the gate multiplies by something that does not depend on the tensor."""
        return self.gate not in (gates.soft_threshold, gates.variational_dropout)

    @property
    def is_told_by_its_values(self) -> bool:
        """Whether what is read says what is stored, but for entries that are closed."""
        return self.is_product and not self.draws

    @property
    def draws(self) -> bool:
        """Whether a reading draws noise now."""
        noisy = self.gate in (gates.hard_concrete, gates.variational_dropout)
        return noisy and self.training and not self.hard

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` through the gate; +0.0 where a hard gate is closed."""
        noise = None
        if self.draws and self.gate is gates.variational_dropout:
            noise = torch.randn_like(weight)
        elif self.draws:
            wide = torch.promote_types(self.logits.dtype, torch.float32)  # half draws 0 too often
            noise = torch.rand_like(self.logits, dtype=wide)
        return self.through(weight, noise)

    def through(self, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return `weight` through the gate, with noise or without."""
        # The logits may be wider: `double()` makes them so, and leaves complex weights.
        if self.gate is gates.soft_threshold:
            return gates.soft_threshold(weight, self._spread(self.logits)).to(weight.dtype)
        if self.gate is gates.variational_dropout:
            if self.hard:
                return apply_mask(weight, self.relevant(weight))
            return gates.variational_dropout(weight, self.logits, noise).to(weight.dtype)
        if self.hard and self.gate is gates.sigmoid:
            return apply_mask(weight, self.mask).to(weight.dtype)
        return (weight * self._multiplier(noise).to(self.logits.dtype)).to(weight.dtype)

    def penalty(self, weight: Tensor) -> Tensor:
        """Return the penalty of the gate, a scalar with its graph.

        The sum of the mask for `sigmoid`; the number of entries that are expected not to be 0 for
        `hard_concrete`; the sum of sigmoid(scores) for `straight_through`; the KL divergence for
        `variational_dropout`. `soft_threshold` has none: weight decay on its logits is its way.

        Args:
            weight: what the gate gets.
        """
        if self.gate is gates.soft_threshold:
            return self.logits.new_zeros(())
        if self.gate is gates.variational_dropout:
            relevance = gates.log_alpha(weight, self.logits)
            is_complex = weight.is_complex()
            return gates.variational_dropout_penalty(relevance, is_complex=is_complex).sum()
        if self.gate is gates.hard_concrete:
            return self._spread(gates.hard_concrete_penalty(self.logits)).sum()
        if self.gate is gates.straight_through:
            return self._spread(torch.sigmoid(self.logits)).sum()
        return self.mask.sum()

    def relevant(self, weight: Tensor, threshold: float | None = None) -> Tensor:
        """Return where log alpha of `variational_dropout` is at most `threshold` (None: 3)."""
        limit = _RELEVANT if threshold is None else threshold
        return gates.log_alpha(weight.detach(), self.logits.detach()) <= limit

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return what to store so that open entries read as `value`, and closed ones stay."""
        if self.gate is gates.soft_threshold:
            threshold = torch.sigmoid(self._spread(self.logits))
            more = value + value.sgn() * threshold
            stays = (value == 0) & (stored.abs() <= threshold)
            return torch.where(stays, stored, more.to(stored))
        if self.gate is gates.variational_dropout:
            # What is irrelevant reads as 0 whatever its value.
            return torch.where(self.relevant(stored), value, stored) if self.hard else value
        mask = self.mask
        more = value.to(stored) / mask
        # Divided by a gate that is all but closed, a value overflows.
        can = (mask != 0) & (more.isfinite() | ~value.isfinite())
        return torch.where(can, more, stored)

    def hardened(self, weight: Tensor, threshold: float | None = None) -> Tensor | None:
        """Return what multiplies `weight` once the gate is pruned; None if it only subtracts.

        Args:
            weight: what is stored.
            threshold: entries stay whose logit (`sigmoid`), mask (`hard_concrete`) or score
                (`straight_through`) is above it, None: 0, the sparsity; whose log alpha is at most
                that (`variational_dropout`), None: 3.
        """
        if self.gate is gates.soft_threshold:
            return None
        if self.gate is gates.variational_dropout:
            return self.relevant(weight, threshold).to(self.logits.dtype)
        if self.gate is gates.sigmoid:
            moved = self.logits - (threshold or 0.0)
            return self._spread(gates.sigmoid(moved, init=self.init, hard=True))
        if threshold is None:
            return self.mask
        if self.gate is gates.straight_through:
            return self._spread((self.logits > threshold).to(self.logits.dtype))
        return self.mask * (self.mask > threshold)

    @torch.no_grad()
    def fold_(self, keep: Tensor | None = None) -> None:
        """Change nothing any more but close what is closed: the gate has been folded into a weight.

        Places outside of what was folded may share it.

        Args:
            keep: bool, what is open from now on; None: what is.
        """
        if self.gate is gates.soft_threshold:
            self.logits.fill_(-math.inf)
        if not self.is_product:
            return
        keep = self.mask != 0 if keep is None else keep
        units = keep if self.pattern is None else self.pattern.pool(keep.double()) > 0
        if self.gate is gates.straight_through:
            self.sparsity.fill_(1 - float(units.double().mean()))
        self.logits.copy_(torch.where(units, _FAR, -_FAR))
        self.hard, self.init = True, math.inf  # whose sigmoid, the divisor, is 1

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`: what a stock `register_parametrization` stores."""
        return value

    def extra_repr(self) -> str:
        """Return the shape, the gate unless it is `sigmoid`, and how it was made."""
        gate = "" if self.gate is gates.sigmoid else f"{self.gate.__name__}, "
        pattern = "" if self.pattern is None else f", {self.pattern}"
        share = f", sparsity={float(self.sparsity):g}" if "sparsity" in self._buffers else ""
        hard = ", hard" if self.hard else ""
        return f"{tuple(self._shape)}, {gate}init={self.init}{pattern}{share}{hard}"

    def _multiplier(self, noise: Tensor | None) -> Tensor:
        if self.gate is gates.hard_concrete:
            return self._spread(gates.hard_concrete(self.logits, noise))
        if self.gate is gates.straight_through:
            return self._spread(gates.straight_through(self.logits, self.sparsity))
        mask = gates.sigmoid(self.logits, self.temperature, init=self.init, hard=self.hard)
        return self._spread(mask)

    def _spread(self, values: Tensor) -> Tensor:
        return values if self.pattern is None else self.pattern.spread(values, self._shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Numbers, not weights: they move with these, but are not rounded with them.
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.logits.is_complex():  # as `to(torch.complex128)` makes everything
            self.logits.data = self.logits.data.real.contiguous()
        for name, buffer in held.items():
            wide = torch.promote_types(buffer.dtype, self.logits.dtype)
            # From meta on there is no number: what `fn` made waits to be loaded.
            now = self._buffers[name] if buffer.is_meta else buffer
            assert now is not None
            self._buffers[name] = now.to(self.logits.device, wide)
        return self
