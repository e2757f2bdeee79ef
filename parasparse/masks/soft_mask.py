"""The module of a learned soft mask: a gate with its parameters and its penalty."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import gates
from parasparse.masks.convert import real_dtype
from parasparse.masks.gate_kinds import GateKind, Multiplier, ProductGate, as_kind
from parasparse.patterns.blocks_channels_heads import Units, has_units
from parasparse.text import described


class SoftMask(nn.Module):
    """A gate with learned parameters between a stored tensor and the layer that reads it.

    Attributes:
        logits: a real Parameter, with the tensor's shape or one value for each unit: the logits or
            scores of the gate, the logit of its threshold, or the log variance.
        gate: the `gate` argument.
        kind: the `GateKind` that implements it.
        hard: if True, the gate reads as after pruning: `sigmoid` as its limit, which trains no
            logits, and `variational_dropout` with 0 where log alpha is above 3. Not in the state
            dict.
        temperature: T of `sigmoid`, a scalar buffer. Changing it with `temperature.fill_` does not
            recompile.
        sparsity: the share of zeros of `straight_through`, also a scalar buffer.

    Args:
        like: the tensor to be masked, which gives the shape, dtype, device and memory format.
        gate: `gates.sigmoid`, `hard_concrete`, `straight_through`, `soft_threshold`,
            `variational_dropout`, a function from logits to the mask, or a `GateKind`.
            `hard_concrete` and `variational_dropout` draw noise at each read in training mode.
        init: the initial value of all logits. None means 2 for `hard_concrete`, -10 for
            `soft_threshold` and `variational_dropout`, and 0 otherwise.
        pattern: a pattern of units, which then share a logit each; None gives each entry its own.
        sparsity: share of zeros, in [0, 1]; required by `straight_through`, and only allowed there.

    Raises:
        ValueError: `sparsity` or `pattern` does not fit the gate, or `init` is out of its range.
        TypeError: `gate` is none of these.

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
            raise ValueError(
                "`sparsity` must be given with `straight_through`, or another gate that takes one, "
                f"and with no other gate; got {sparsity} for {described(gate)}."
            )
        if pattern is not None and not (has_units(pattern) and kind.takes_units):
            raise ValueError(
                f"`pattern` must be a pattern of units, and the gate must take one; got "
                f"{pattern!r} for {described(gate)}."
            )
        self.gate, self.pattern, self.hard, self.folded = gate, pattern, False, False
        self.init = kind.init if init is None else init
        self._shape = like.shape
        dtype = real_dtype(like.dtype)
        kind.check_init(self.init, dtype)
        whole = torch.full_like(like, self.init, dtype=dtype, requires_grad=False)
        if pattern is not None:
            units = pattern.pool(torch.zeros(like.shape, device="cpu")).shape  # meta has no values
            whole = torch.full(units, self.init, dtype=dtype, device=like.device)
        self.logits = nn.Parameter(whole)
        for name, buffer in kind.buffers(self.logits, sparsity).items():
            self.register_buffer(name, buffer)
        if isinstance(kind, Multiplier):
            kind.check(self.logits)

    @property
    def mask(self) -> Tensor:
        """The current mask, without noise. A gate that does not multiply has no such attribute."""
        if not isinstance(self.kind, ProductGate):
            raise AttributeError(f"{described(self.gate)} does not multiply by a mask")
        return self.spread(self.kind.value(self, None))

    @property
    def is_product(self) -> bool:
        """Whether the gate multiplies by a mask that does not depend on the tensor."""
        return isinstance(self.kind, ProductGate)

    @property
    def is_told_by_its_values(self) -> bool:
        """Whether the masked tensor determines the stored one where the gate is open."""
        return self.is_product and not self.draws

    @property
    def draws(self) -> bool:
        """Whether a read now draws noise."""
        return self.kind.draws and self.training and not (self.hard or self.folded)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked `weight`. It is +0.0 where a hard gate is closed."""
        return self.through(weight, self.kind.noise(self, weight) if self.draws else None)

    def through(self, weight: Tensor, noise: Tensor | None) -> Tensor:
        """Return the masked `weight`; `noise` may be None."""
        # `double()` makes the logits wider than a complex weight, which it does not change.
        return self.kind.apply(self, weight, noise).to(weight.dtype)

    def penalty(self, weight: Tensor) -> Tensor:
        """Return the penalty of the gate, a differentiable scalar.

        It is the sum of the mask for `sigmoid`, the expected number of entries that are not 0 for
        `hard_concrete`, the sum of sigmoid(scores) for `straight_through`, the KL divergence for
        `variational_dropout`, and 0 for `soft_threshold`, which uses weight decay on its logits.
        `weight` is the input of the gate.
        """
        return self.kind.penalty(self, weight)

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return the tensor to store, so that open entries read as `value` and closed ones stay."""
        return self.kind.merged(self, value, stored)

    def hardened(self, weight: Tensor, threshold: float | None = None) -> Tensor | None:
        """Return the mask after pruning the gate, or None if the gate does not multiply.

        Args:
            weight: the stored weight.
            threshold: keeps entries whose logit (`sigmoid`), mask (`hard_concrete`) or score
                (`straight_through`) is above it, or whose log alpha (`variational_dropout`) is at
                most this. None means 0, the sparsity for `straight_through`, and 3 for
                `variational_dropout`.
        """
        return self.kind.hardened(self, weight, threshold)

    @torch.no_grad()
    def fold_(self, keep: Tensor | None = None) -> None:
        """Fix the gate at 0 and 1 after it has been folded into a weight.

        The bool `keep` selects the entries that stay open; None keeps those that are open now. Tied
        tensors that were not folded may still use the gate.
        """
        if getattr(self.pattern, "shares_logits", False):
            self.logits = nn.Parameter(self.logits.clone(), self.logits.requires_grad)
        self.kind.fold_(self, keep)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`, which torch's `register_parametrization` then stores."""
        return value

    def extra_repr(self) -> str:
        """Return the shape, the gate unless it is `sigmoid`, and the other arguments."""
        gate = "" if self.gate is gates.sigmoid else f"{described(self.gate)}, "
        pattern = "" if self.pattern is None else f", {self.pattern}"
        share = f", sparsity={float(self.sparsity):g}" if "sparsity" in self._buffers else ""
        hard = ", hard" if self.hard else ""
        return f"{tuple(self._shape)}, {gate}init={self.init}{pattern}{share}{hard}"

    def spread(self, values: Tensor) -> Tensor:
        """Return a value for each entry, from `values` in the shape of the logits."""
        return values if self.pattern is None else self.pattern.spread(values, self._shape)

    def pooled(self, keep: Tensor) -> Tensor:
        """Return for each logit whether any of its entries is kept."""
        return keep if self.pattern is None else self.pattern.pool(keep.double()) > 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The buffers move with the weights, but must not be rounded with them.
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.logits.is_complex():  # as `to(torch.complex128)` makes everything
            self.logits.data = self.logits.data.real.contiguous()
        for name, buffer in held.items():
            wide = torch.promote_types(buffer.dtype, self.logits.dtype)
            # A buffer on meta has no value, so the result of `fn` waits to be loaded.
            now = self._buffers[name] if buffer.is_meta else buffer
            assert now is not None
            self._buffers[name] = now.to(self.logits.device, wide)
        return self
