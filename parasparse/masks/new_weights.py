"""A mask together with the weights that it needs."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NewWeights:
    """What a treatment returns to change the stored weights too.

    Attributes:
        mask: bool, of the shape of the tensor.
        weights: the new values, finite, of the shape and dtype of the tensor.
    """

    mask: Tensor
    weights: Tensor
