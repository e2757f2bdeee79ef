"""Weights as stacks of matrices (out, in), whatever the layer stores."""

from dataclasses import dataclass

from torch import Size, Tensor


@dataclass(frozen=True)
class Layout:
    """How a weight is made of matrices (out, in).

    Attributes:
        groups: number of matrices: the groups of a convolution, the experts of a stack.
        is_transposed: the matrices are stored as (in, out), as in the Conv1D of GPT-2.
        is_stack: the first dimension counts the matrices.
    """

    groups: int = 1
    is_transposed: bool = False
    is_stack: bool = False

    def matrices(self, weight: Tensor) -> Tensor:
        """Return `weight` as (groups, out, in); the inputs of a convolution are its patches."""
        weight = weight.mT if self.is_transposed else weight
        if self.is_stack:
            return weight
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def restored(self, matrices: Tensor, shape: Size) -> Tensor:
        """Return `matrices` in the `shape` of the weight: the inverse of `matrices`."""
        if self.is_transposed:
            return (matrices if self.is_stack else matrices[0]).mT.contiguous()
        return matrices.reshape(shape)

    def of_inputs(self, values: Tensor, shape: Size) -> Tensor:
        """Return values (groups, in) of inputs so that they broadcast to a weight of `shape`."""
        if len(shape) == 2 and self.groups == 1 and not self.is_stack:
            return values.T if self.is_transposed else values
        per_output = values.unsqueeze(1)
        outputs = shape[-1 if self.is_transposed else 1] if self.is_stack else shape[0]
        out = outputs if self.is_stack else outputs // self.groups
        return self.restored(per_output.expand(-1, out, -1), shape)
