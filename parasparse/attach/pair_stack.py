"""The stacks of a complex weight in two real tensors, under a mask that must see both at once."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.soft_mask import SoftMask
from parasparse.sharding.dtensors import is_dtensor, on_local


class PairParametrizationList(MaskedParametrizationList):
    """One part of a pair: it gives the mask the complex weight, and returns its part of that.

    Attributes:
        parts: the stacks of the real and of the imaginary tensor. In a tuple they are no
            children of each other.
        index: 0 for the real one, 1 for the imaginary one. Exporters hand out stand-ins, so that
            `self is parts[0]` says nothing.
    """

    parts: tuple[PairParametrizationList, PairParametrizationList]
    index: int

    @property
    def mask(self) -> SoftMask:
        """The module that masks."""
        return self[-1]  # type: ignore[return-value]

    def received(self) -> Tensor:
        """Return the complex weight that the mask receives."""
        real, imaginary = (part.stored() for part in self.parts)
        return joined(real, imaginary)

    def forward(self) -> Tensor:
        """Return this part of the masked weight."""
        if self.stand_in is not None or self.frozen is not None:
            return super().forward()
        # A product knows no parts, and inductor no complex numbers.
        alone = self.mask.is_product
        value = self.mask(self.stored()) if alone else self._own(self.mask(self.received()))
        return value if self.probe is None else value + self.probe

    def right_inverse(self, value: Tensor) -> None:
        """Store `value` so that this part reads as it says, and the other as before."""
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
        """Refuse: the gate would have to be that of both parts still."""
        raise RuntimeError(
            "a part of a real/imag pair under a `Gate` cannot be tied to another Parameter. "
            "`squash` it first, or assign a plain tensor."
        )

    def stacks_read(self) -> tuple[nn.Module, ...]:
        """Return the stacks of both parts."""
        return self.parts

    def replace_mask(self, module: nn.Module) -> None:
        """Put `module` in the place of the mask; it sees this part alone."""
        super().replace_mask(module)
        self.separate()

    def separate(self) -> None:
        """Be a stack of its own."""
        self.__class__ = MaskedParametrizationList  # type: ignore[assignment]
        for name in ("parts", "index"):
            self.__dict__.pop(name, None)

    def _own(self, weight: Tensor) -> Tensor:
        like: Any = self.original if self.is_tensor else self.original0
        return (weight.imag if self.index else weight.real).to(like.dtype)


def join(
    stacks: list[MaskedParametrizationList],
    index: int,
    real: MaskedParametrizationList,
    imaginary: MaskedParametrizationList,
) -> None:
    """Let the mask of `stacks`, places of one part, see both: as `real` and `imaginary` have them.

    Args:
        stacks: to be changed.
        index: 0 if they hold the real part, 1 for the imaginary one.
        real: where the real part is.
        imaginary: where the imaginary part is.
    """
    for stack in stacks:
        stack.__class__ = PairParametrizationList
        stack.__dict__ |= {"parts": (real, imaginary), "index": index}


def joined(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return the complex tensor of two parts; of half precision one of 32 bits a part."""
    wide = torch.promote_types(real.dtype, torch.float32)
    real, imaginary = real.to(wide), imaginary.to(wide)
    if not is_dtensor(real) or (torch.is_grad_enabled() and real.requires_grad):
        return torch.complex(real, imaginary)
    return on_local(torch.complex, real, imaginary)  # which DTensors of torch 2.9 do not know
