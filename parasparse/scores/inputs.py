"""The inputs of layers as rows, one for each product with the weight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from parasparse.attach.classes import base_class
from parasparse.scores.layouts import Layout

_CHUNK = 1 << 22  # numbers in 64 bits at a time


@dataclass(frozen=True)
class Rows:
    """How a layer reads its inputs.

    Attributes:
        layout: of its weight.
        geometry: layers with the same geometry make the same rows of one input.
        of: from an input to chunks (groups, rows, in), in order.
    """

    layout: Layout
    geometry: tuple[Any, ...]
    of: Callable[[Tensor], Iterator[Tensor]]


def rows_of(module: nn.Module) -> Rows | None:
    """Return how `module` reads its inputs; None if its weight is no matrix that inputs meet."""
    if isinstance(module, nn.Linear):
        return Rows(Layout(), ("linear",), _of_linear)
    if is_conv1d_of_gpt2(module):
        return Rows(Layout(is_transposed=True), ("linear",), _of_linear)
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        geometry = (
            module.groups, module.kernel_size, module.stride, module.dilation,
            tuple(module._reversed_padding_repeated_twice), module.padding_mode,
        )  # fmt: skip
        return Rows(Layout(module.groups), geometry, partial(_of_convolution, module))
    return None


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """Whether `module` is the linear layer of transformers whose weight is stored as (in, out)."""
    return base_class(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _of_linear(x: Tensor) -> Iterator[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    for part in rows.split(max(_CHUNK // max(rows.shape[1], 1), 1)):
        yield part.unsqueeze(0)


def _of_convolution(module: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    kernel, dims = module.kernel_size, len(module.kernel_size)
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patch = torch.Size(kernel).numel()
    for part in x.split(max(_CHUNK // max(x[:1].numel() * patch, 1), 1)):
        patches = F.pad(part, module._reversed_padding_repeated_twice, mode)
        for dim in range(dims):
            gap, step = module.dilation[dim], module.stride[dim]
            width = (kernel[dim] - 1) * gap + 1
            patches = patches.unfold(2 + dim, width, step)[..., ::gap]
        # (batch, groups, channels, *positions, *kernel), to (groups, rows, in)
        patches = patches.unflatten(1, (module.groups, -1))
        places, kernels = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        patches = patches.permute(1, 0, *places, 2, *kernels)
        yield patches.flatten(2 + dims).flatten(1, 1 + dims)
