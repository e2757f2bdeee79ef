"""Reads bytes from front to back."""

import struct
from typing import Any

import torch
from torch import Tensor


class Cursor:
    """A place in `data` (1-D, uint8), from which bytes are taken."""

    def __init__(self, data: Tensor) -> None:
        self._data = data
        self._place, self._end = 0, data.numel()

    def take(self, nbytes: int) -> Tensor:
        """Return the next bytes; raise ValueError if there are fewer."""
        if not 0 <= nbytes <= self.left:
            raise ValueError(f"{nbytes} bytes must follow; {self.left} do.")
        self._place += nbytes
        return self._data[self._place - nbytes : self._place]

    def numbers(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return the next `number` integers of `dtype`."""
        return self.take(number * dtype.itemsize).clone().view(dtype)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Return the next numbers, as `struct.unpack` does."""
        return struct.unpack(layout, bytes(self.take(struct.calcsize(layout)).tolist()))

    @property
    def left(self) -> int:
        """Bytes that have not been taken."""
        return self._end - self._place
