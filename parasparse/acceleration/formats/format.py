"""Ways to store and to multiply a matrix that is mostly zeros.

`of` makes a format from a weight, seen as a matrix W of shape (outputs, inputs), or returns None if
the format cannot hold the weight or would store most of its zeros. A format multiplies in two
layouts, which saves transposing:

    rows(x, b) == x @ W.T + b    x: (n, inputs)     a linear layer
    columns(u) == W @ u          u: (inputs, n)     a convolution, of its patches
"""

import warnings
from collections.abc import Callable, Collection
from typing import Protocol

from torch import Tensor

from parasparse.acceleration.formats.compiled import Compiled
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
        """Return the stored tensors."""


FORMATS: dict[str, Callable[[Tensor], Format | None]] = {
    "csr": CSR.of, "bag": Bag.of, "bsr": BSR.of, "channels": Channels.of, "2:4": TwoFour.of,
}  # fmt: skip
# With what `accelerate` chooses from only when asked.
ALL_FORMATS = FORMATS | {"compiled": Compiled.of}
_BESIDE_CSR = {"bag": Bag, "compiled": Compiled}  # they share its tensors


def formats_of(weight: Tensor, names: Collection[str]) -> dict[str, Format]:
    """Return `weight` in each of the formats `names` that can hold it."""
    found: dict[str, Format] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC|BSR) tensor support is in beta")
        for name in [name for name in ALL_FORMATS if name in names]:
            csr = found.get("csr")
            made: Format | None
            if name in _BESIDE_CSR and isinstance(csr, CSR):
                made = _BESIDE_CSR[name].beside(csr)
            else:
                made = ALL_FORMATS[name](weight)
            if made is not None:
                found[name] = made
    return found
