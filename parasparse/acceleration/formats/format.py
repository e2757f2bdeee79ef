"""Ways to store and to multiply a matrix that is mostly zeros.

Each format is made `of` a weight whose first dimension counts outputs, seen as a matrix W of shape
(outputs, inputs), and multiplies in two layouts, so that nothing is transposed without need:

    rows(x, b) == x @ W.T + b    x: (n, inputs)     what a linear layer does
    columns(u) == W @ u          u: (inputs, n)     what a convolution does with its patches

`of` returns None where the format cannot hold the weight, or would hold most of its zeros.
"""

import warnings
from collections.abc import Callable, Collection
from typing import Protocol

from torch import Tensor

from parasparse.acceleration.formats.compressed import BSR, CSR, Bag
from parasparse.acceleration.formats.regular import Channels, TwoFour


class Format(Protocol):
    """A stored matrix that multiplies."""

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias, contiguous."""

    def columns(self, u: Tensor) -> Tensor:
        """Return W @ u."""

    def dense(self) -> Tensor:
        """Return W."""

    def tensors(self) -> list[Tensor]:
        """Return what is stored."""


FORMATS: dict[str, Callable[[Tensor], Format | None]] = {
    "csr": CSR.of,
    "bag": Bag.of,
    "bsr": BSR.of,
    "channels": Channels.of,
    "2:4": TwoFour.of,
}


def formats_of(weight: Tensor, names: Collection[str]) -> dict[str, Format]:
    """Return `weight` in those of the formats `names` that can hold it."""
    found: dict[str, Format] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC|BSR) tensor support is in beta")
        for name in [name for name in FORMATS if name in names]:
            csr = found.get("csr")
            shared = name == "bag" and isinstance(csr, CSR)
            made = Bag.beside(csr) if shared else FORMATS[name](weight)  # type: ignore[arg-type]
            if made is not None:
                found[name] = made
    return found
