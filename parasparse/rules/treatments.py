"""Treatments: the right sides of rules.

A treatment is a callable `dict[name, Tensor] -> dict[name, mask or nn.Module]`. It is called with
all tensors that its rule reaches, and returns a mask or a mask module for each of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parasparse import gates
from parasparse.counts import check_sparsity
from parasparse.masks.gate_kinds import GateKind, ProductGate, as_kind
from parasparse.masks.soft_mask import SoftMask
from parasparse.rules.prune import Prune
from parasparse.rules.types import Treatment
from parasparse.text import described


@dataclass(frozen=True, eq=False, repr=False)
class Fixed:
    """Give every tensor this mask.

    Args:
        mask: bool, integer or real tensor, array, nested list or number that broadcasts to the
            tensor; None attaches a mask that is not set yet.
        layout: "out_in", the layout of weights; "in_out" if the first dimension of the mask is that
            of the inputs.

    Raises:
        ValueError: the layout is unknown, or "in_out" for a mask with fewer than two dimensions.

    Examples:
        >>> Fixed([[1, 0], [1, 1]], layout="in_out")({"w": torch.ones(2, 2)})["w"].tolist()
        [[1, 1], [0, 1]]

    Reference: CustomizedLinear, whose masks are (in, out).
    """

    mask: Any
    layout: Literal["out_in", "in_out"] = field(default="out_in", kw_only=True)

    def __post_init__(self) -> None:
        if self.layout not in ("out_in", "in_out"):
            raise ValueError(f'`layout` must be "out_in" or "in_out"; got {self.layout!r}.')
        given = self.layout == "in_out" and self.mask is not None
        if given and torch.as_tensor(self.mask).ndim < 2:
            raise ValueError('`layout="in_out"` needs a mask with two or more dimensions.')

    def __repr__(self) -> str:
        return f"Fixed({described(self.mask)}, layout={self.layout!r})"

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the mask for each of `tensors`."""
        mask = self.mask
        if mask is not None and self.layout == "in_out":
            mask = torch.as_tensor(mask).transpose(0, 1)
        return dict.fromkeys(tensors, mask)


@dataclass(frozen=True, repr=False)
class Gate:
    """Attach a learned soft mask to each tensor: a `SoftMask`, trained together with the weights.

    Args:
        function: `gates.sigmoid` (Continuous Sparsification), `gates.hard_concrete` (L0),
            `gates.straight_through` (movement pruning), `gates.soft_threshold` (STR),
            `gates.variational_dropout`, or a custom gate: a function from logits to the mask, or a
            `GateKind`.
        init: initial value of its parameters; None: the default of the gate (see `SoftMask`).
        pattern: pattern of units (channels, blocks, heads), each of which gets one logit. With
            `coupled`, the tensors of a unit share its logit, and each of them draws its own noise.
        sparsity: share of zeros in [0, 1], for `straight_through` only.

    Raises:
        ValueError: `init` is not finite, or arguments exclude each other.

    Examples:
        >>> Gate(init=0.5)({"w": torch.ones(2, 2)})["w"]
        SoftMask((2, 2), init=0.5)
        >>> Gate(gates.hard_concrete, pattern=patterns.channel(0))
        Gate(hard_concrete, pattern=channel(dim=0, norm=None))
    """

    function: Callable[..., Tensor] | GateKind = gates.sigmoid
    init: float | None = field(default=None, kw_only=True)
    pattern: Any = field(default=None, kw_only=True)
    sparsity: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.init is not None and not math.isfinite(self.init):
            raise ValueError(f"`init` must be finite; got {self.init}.")
        if self.pattern is None:
            self._made(torch.empty(1))  # raises if arguments exclude each other

    def __repr__(self) -> str:
        name = [] if self.function is gates.sigmoid else [described(self.function)]
        given = {"init": self.init, "pattern": self.pattern, "sparsity": self.sparsity}
        rest = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        return f"Gate({', '.join(name + rest)})"

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Return a `SoftMask` for each of `tensors`."""
        if not hasattr(self.pattern, "apart"):
            return {name: self._made(tensor, self.pattern) for name, tensor in tensors.items()}
        if not isinstance(as_kind(self.function), ProductGate):
            raise ValueError(
                "`function` must multiply by a mask with the pattern `coupled`, because an entry "
                f"may be part of two units; {described(self.function)} does not."
            )
        parts = self.pattern.apart(tensors)
        masks = {name: self._made(tensor, parts[name]) for name, tensor in tensors.items()}
        logits = next(mask.logits for mask in masks.values())
        for mask in masks.values():
            mask.logits = logits
        return masks  # type: ignore[return-value]

    def _made(self, tensor: Tensor, pattern: Any = None) -> SoftMask:
        return SoftMask(
            tensor, gate=self.function, init=self.init, pattern=pattern, sparsity=self.sparsity
        )


def keep_nonzero(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return masks that drop the zeros of `tensors`: the treatment "zeros"."""
    return {name: tensor != 0 for name, tensor in tensors.items()}


def as_treatment(value: Any) -> Treatment | None:
    """Return the right side of a rule as a callable, or None; raise if it is not a treatment."""
    if value is None:
        return None
    if isinstance(value, str):
        if value != "zeros":
            raise ValueError(
                f'a treatment that is a string must be "zeros"; got {value!r}. Use None to leave '
                "tensors dense."
            )
        return keep_nonzero
    if isinstance(value, (nn.Module, type)):
        raise TypeError(
            f"a treatment must not be a module or a class; got {described(value)}. To attach your "
            "own modules, use a callable that returns {name: module}."
        )
    if is_array(value):
        return Fixed(value)
    part = _part_of_prune(value)
    if part is not None:
        raise TypeError(
            f"a treatment must not be a {part} alone; got {described(value)}. Pass it to "
            f"Prune: Prune(..., {part}={described(value)})."
        )
    if callable(value):
        return value  # type: ignore[no-any-return]
    return Prune(check_sparsity(value, "rules"))


def _part_of_prune(value: Any) -> str | None:
    """Return the argument of `Prune` for which parasparse made `value`, or None."""
    module = str(getattr(value, "__module__", ""))
    parts = ("pattern", "score", "distribution")
    return next((part for part in parts if module.startswith(f"parasparse.{part}s")), None)


def is_array(value: object) -> bool:
    """Whether `value` is a tensor, array or list; a NumPy scalar is not."""
    array = hasattr(value, "__array__") and not isinstance(value, Real)
    return array or isinstance(value, (Tensor, list, tuple))
