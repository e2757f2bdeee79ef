"""Compressed rows, multiplied by a kernel in C++ that is compiled on the user's machine."""

import ctypes
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from parasparse.acceleration.formats.compressed import Bag
from parasparse.acceleration.formats.library import library


class Compiled(Bag):
    """The rows of `Bag`, multiplied by `compiled.cpp`; by `Bag`'s kernel without a compiler."""

    kind: ClassVar[str] = "compiled"

    def rows(self, x: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        kernel = library()
        if kernel is None or not self._can_read(x, bias):
            return super().rows(x, bias)
        x = x.contiguous()
        result = x.new_empty(len(x), self.shape[0])
        kernel.parasparse_rows(
            *self._matrix_of(bias), _pointer(x), ctypes.c_int64(len(x)), _pointer(result),
            torch.get_num_threads(),
        )  # fmt: skip
        return result

    def columns(self, u: Tensor) -> Tensor:  # noqa: D102
        if library() is None or not self._can_read(u, None):
            return super().columns(u)
        u = u.contiguous()
        return self.windows(u, self._places * u.shape[1], u.shape[1])

    def windows(self, u: Tensor, places: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
        """Return W @ v + bias, where row j of v are the `n` values of `u` from places[j] on."""
        kernel = library()
        if kernel is None or not self._can_read(u, bias):
            rows = torch.stack([u.view(-1)[p : p + n] for p in places.tolist()])
            product = super().columns(rows)
            return product if bias is None else product.add_(bias[:, None])
        result = u.new_empty(self.shape[0], n)
        kernel.parasparse_columns(
            *self._matrix_of(bias), _pointer(u), _pointer(places), ctypes.c_int64(n),
            _pointer(result), torch.get_num_threads(),
        )  # fmt: skip
        return result

    def _can_read(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernel can read the memory of the tensors; torch reads the others."""
        if bias is None:
            return _is_plain(x)
        fits = bias.shape == self.shape[:1] and bias.is_contiguous()
        return fits and _is_plain(x) and _is_plain(bias)

    @cached_property
    def _places(self) -> Tensor:
        return torch.arange(self.shape[1])

    def _matrix_of(self, bias: Tensor | None) -> list[object]:
        sizes = [ctypes.c_int64(size) for size in self.shape]
        return [*sizes, *map(_pointer, self.tensors()), bias if bias is None else _pointer(bias)]


def _is_plain(tensor: Tensor) -> bool:
    """Whether float32 values of `tensor` lie in memory; those of other classes need not."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_neg():
        return False
    return tensor.is_cpu and tensor.dtype == torch.float32


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
