"""The products of a run: what they read, and how many multiply-adds they take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Read:
    """A product that sums over channels.

    Attributes:
        columns: ids of what is summed over: (1, inputs), or (outputs, inputs) of a grouped
            convolution.
        rows: id of each output; 0: an output that stays.
        states: of the weights, (outputs, inputs), or (outputs, inputs * kernel).
        constants: like `columns`: the value of an input that is the same everywhere and does not
            depend on the network's input; NaN: it is not.
        weight: name of the parameter that is multiplied, if it is one as it is stored.
        summed: the dimension of the parameter that is summed over.
        bias: name of the parameter that is added.
        padded: whether zeros are summed at the borders.
        module: name of the module that reads.
    """

    columns: Tensor
    rows: Tensor
    states: Tensor
    constants: Tensor
    weight: str | None
    summed: int
    bias: str | None
    padded: bool
    module: str


@dataclass(frozen=True)
class Product:
    """A product with a weight, to count multiply-adds.

    Attributes:
        positions: how often each weight is used, times the size of a kernel.
        rows: ids of the outputs.
        columns: ids of the inputs of each output.
    """

    positions: int
    rows: Tensor
    columns: Tensor
