"""The stacks of a complex weight in two real tensors whose mask must read both."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from parasparse.attach.stack import MaskedParametrizationList, originals_in
from parasparse.masks.soft_mask import SoftMask
from parasparse.sharding.dtensors import is_dtensor, on_local


class PairParametrizationList(MaskedParametrizationList):
    """The stack of one component: it masks the complex weight and returns its component.

    Attributes:
        parts: the stacks of the real and the imaginary tensor. They are in a tuple, so they are not
            registered as submodules of each other.
        index: 0 for the real one, 1 for the imaginary one. Exporters replace modules, so this
            cannot be `self is parts[0]`.
    """

    parts: tuple[PairParametrizationList, PairParametrizationList]
    index: int

    @property
    def mask(self) -> SoftMask:
        """The module that masks."""
        return self[-1]  # type: ignore[return-value]

    def received(self) -> Tensor:
        """Return the complex weight, the input of the mask."""
        return joined(*(part.stored() for part in self.parts))

    def _masked(self) -> Tensor:
        # Multiplying needs only this component, and inductor does not support complex numbers.
        alone = self.mask.is_product
        value = self.mask(self.stored()) if alone else self._own(self.mask(self.received()))
        return value if self.probe is None else value + self.probe

    def right_inverse(self, value: Tensor) -> None:
        """Store `value` as this component, and keep the value of the other."""
        with torch.no_grad():
            stored = self.received()
        self.check_assigned(value, stored.shape)
        with torch.no_grad():
            now = self.mask.through(stored, None)
            both = (now.real, value) if self.index else (value, now.imag)
            merged = self.mask.merged(joined(*both), stored)
            for part, new in zip(self.parts, (merged.real, merged.imag), strict=True):
                part.store(new)

    def retie(self, parameter: nn.Parameter) -> NoReturn:
        """Refuse, because both components share the gate."""
        raise RuntimeError(
            "a component of a real/imag pair under a `Gate` cannot be tied to another Parameter. "
            "`squash` it first, or assign a plain tensor."
        )

    def stacks_read(self) -> tuple[nn.Module, ...]:
        """Return the stacks of both components."""
        return self.parts

    def replace_mask(self, module: nn.Module) -> None:
        """Mask only this component, with `module`, from now on."""
        super().replace_mask(module)
        self.separate()

    def separate(self) -> None:
        """Become a stack that is not part of a pair."""
        self.__class__ = MaskedParametrizationList  # type: ignore[assignment]
        for name in ("parts", "index"):
            self.__dict__.pop(name, None)

    def _own(self, weight: Tensor) -> Tensor:
        component = weight.imag if self.index else weight.real
        return component.to(originals_in(self)[0].dtype)


def join(
    stacks: list[MaskedParametrizationList],
    index: int,
    real: MaskedParametrizationList,
    imaginary: MaskedParametrizationList,
) -> None:
    """Let the mask of `stacks`, which store component `index`, read `real` and `imaginary`."""
    for stack in stacks:
        stack.__class__ = PairParametrizationList
        stack.__dict__ |= {"parts": (real, imaginary), "index": index}


def joined(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return the complex tensor of two components, of at least 32 bits each."""
    wide = torch.promote_types(real.dtype, torch.float32)
    real, imaginary = real.to(wide), imaginary.to(wide)
    if not is_dtensor(real) or (torch.is_grad_enabled() and real.requires_grad):
        return torch.complex(real, imaginary)
    return on_local(torch.complex, real, imaginary)  # not supported for DTensors in torch 2.9
