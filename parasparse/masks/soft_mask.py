"""The module of a learned soft mask: one of the gates, its parameters, its penalty."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import gates
from parasparse.masks.gate_kinds import GateKind, ProductGate, as_kind
from parasparse.patterns.units import Units, has_units
from parasparse.text import described


class SoftMask(nn.Module):
    """A gate with learned parameters between a stored tensor and its reader.

    Attributes:
        logits: a Parameter, all `init` at first: the logits or scores of the gate, the logit of its
            threshold, or the log variance. Real, of the tensor's shape or one for each unit.
        gate: as given.
        kind: the `GateKind` that says how it masks.
        hard: what the trained network is pruned to, where that differs: the limit of `sigmoid`,
            which trains no logits; weights with log alpha above 3 are 0 for `variational_dropout`.
            Not in the state.
        temperature: T of `sigmoid`, a scalar tensor buffer, so that changing it
            (`temperature.fill_`) compiles nothing anew.
        sparsity: of `straight_through`, the same.

    Args:
        like: the tensor to be masked; gives shape, dtype, device and memory format.
        gate: one of `gates.sigmoid`, `hard_concrete`, `straight_through`, `soft_threshold`,
            `variational_dropout`, of which the second and the last draw noise at each read in
            training mode; or a gate of your own: a function from logits to the mask, or a
            `GateKind`.
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
        gate: Callable[..., Tensor] | GateKind = gates.sigmoid,
        init: float | None = None,
        pattern: Units | None = None,
        sparsity: float | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind = as_kind(gate)
        if (sparsity is not None) != kind.takes_sparsity:
            raise ValueError("`sparsity` must be given with `straight_through`, and only there.")
        if pattern is not None and not (has_units(pattern) and kind.takes_units):
            raise ValueError(
                f"`pattern` must be one of units, each with its own logit; got {pattern!r} for "
                f"{described(gate)}."
            )
        self.gate, self.pattern, self.hard = gate, pattern, False
        self.init = kind.init if init is None else init
        self._shape = like.shape
        dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        kind.check_init(self.init, dtype)
        whole = torch.full_like(like, self.init, dtype=dtype, requires_grad=False)
        if pattern is not None:
            units = pattern.pool(torch.zeros(like.shape, device="cpu")).shape  # meta has no values
            whole = torch.full(units, self.init, dtype=dtype, device=like.device)
        self.logits = nn.Parameter(whole)
        for name, buffer in kind.buffers(self.logits, sparsity).items():
            self.register_buffer(name, buffer)

    @property
    def mask(self) -> Tensor:
        """What multiplies the tensor now, but for noise; not there where the gate adds."""
        if not isinstance(self.kind, ProductGate):
            raise AttributeError(f"{described(self.gate)} is no product with a mask")
        return self.spread(self.kind.value(self, None))

    @property
    def is_product(self) -> bool:
        """Whether the gate multiplies by something that does not depend on the tensor."""
        return isinstance(self.kind, ProductGate)

    @property
    def is_told_by_its_values(self) -> bool:
        """Whether what is read says what is stored, but for entries that are closed."""
        return self.is_product and not self.draws

    @property
    def draws(self) -> bool:
        """Whether a read draws noise now."""
        return self.kind.draws and self.training and not self.hard

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` through the gate; +0.0 where a hard gate is closed."""
        return self.through(weight, self.kind.noise(self, weight) if self.draws else None)

    def through(self, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return `weight` through the gate, with noise or without."""
        # The logits may be wider: `double()` makes them so, and leaves complex weights.
        return self.kind.apply(self, weight, noise).to(weight.dtype)

    def penalty(self, weight: Tensor) -> Tensor:
        """Return the penalty of the gate, a scalar with its graph.

        The sum of the mask for `sigmoid`; the number of entries that are expected not to be 0 for
        `hard_concrete`; the sum of sigmoid(scores) for `straight_through`; the KL divergence for
        `variational_dropout`. `soft_threshold` has none: weight decay on its logits is its way.

        Args:
            weight: what the gate gets.
        """
        return self.kind.penalty(self, weight)

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return the tensor to store: `value` where the gate is open, the old values elsewhere."""
        return self.kind.merged(self, value, stored)

    def hardened(self, weight: Tensor, threshold: float | None = None) -> Tensor | None:
        """Return what multiplies `weight` once the gate is pruned; None if it only subtracts.

        Args:
            weight: what is stored.
            threshold: entries stay whose logit (`sigmoid`), mask (`hard_concrete`) or score
                (`straight_through`) is above it, None: 0, the sparsity; whose log alpha is at most
                that (`variational_dropout`), None: 3.
        """
        return self.kind.hardened(self, weight, threshold)

    @torch.no_grad()
    def fold_(self, keep: Tensor | None = None) -> None:
        """Fix the gate at 0 and 1 after it has been folded into a weight.

        Places outside of what was folded may share it.

        Args:
            keep: bool, what is open from now on; None: what is.
        """
        self.kind.fold_(self, keep)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`: what a stock `register_parametrization` stores."""
        return value

    def extra_repr(self) -> str:
        """Return the shape, the gate unless it is `sigmoid`, and how it was made."""
        gate = "" if self.gate is gates.sigmoid else f"{described(self.gate)}, "
        pattern = "" if self.pattern is None else f", {self.pattern}"
        share = f", sparsity={float(self.sparsity):g}" if "sparsity" in self._buffers else ""
        hard = ", hard" if self.hard else ""
        return f"{tuple(self._shape)}, {gate}init={self.init}{pattern}{share}{hard}"

    def spread(self, values: Tensor) -> Tensor:
        """Return `values` of the shape of the logits as one for each entry."""
        return values if self.pattern is None else self.pattern.spread(values, self._shape)

    def pooled(self, keep: Tensor) -> Tensor:
        """Return whether any entry is kept that a logit is for."""
        return keep if self.pattern is None else self.pattern.pool(keep.double()) > 0

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
