"""Gates: the functions of learned soft masks. They know tensors and numbers only."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(
    logits: Tensor, temperature: Tensor | float = 1.0, *, init: float = 0.0, hard: bool = False
) -> Tensor:
    """Return the gate of Continuous Sparsification, or its limit for T -> inf.

    m = sigmoid(T s) / sigmoid(s0); in the limit (s > 0) / sigmoid(s0).

    Args:
        logits: s, real, any shape.
        temperature: T > 0; the higher, the closer to 0 or 1/sigmoid(s0).
        init: s0, the value that all logits had at first: there and at T = 1 the mask is 1.
        hard: return the limit, which has no gradient.

    Examples:
        >>> sigmoid(torch.tensor([-1.0, 0.0, 2.0]), hard=True).tolist()
        [0.0, 0.0, 2.0]

    Reference: Savarese, Silva, Maire, "Winning the Lottery with Continuous Sparsification", 2019,
        arXiv:1912.04427, section 3.
    """
    if hard:
        # Written so that the scale is rounded once, in the dtype of the logits, as when soft.
        return (logits > 0).to(logits.dtype) / torch.sigmoid(logits.new_tensor(init))
    return torch.sigmoid(temperature * logits) / torch.sigmoid(logits.new_tensor(init))
