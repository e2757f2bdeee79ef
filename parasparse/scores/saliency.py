"""Scores from gradients, curvature or inputs that `collect` has recorded.

For complex weights, w g means Re(conj(g) w): how the loss changes along w.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.scores.damping import damped
from parasparse.scores.products import each_part, product, wide
from parasparse.scores.statistics import Statistics


@dataclass(frozen=True, eq=False)
class taylor:  # noqa: N801 - a score reads as a function
    """Score (w g)^2, with g the mean gradient: the squared change of the loss without w.

    Args:
        statistics: from a `collect` block with backward passes.

    Raises:
        RuntimeError: on call, if the block recorded nothing for the tensor.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
        arXiv:1906.10771, equation 8. Differs: squares the mean gradient; the paper's code takes
        the mean of the squares over batches, which is twice `fisher`.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        # In 64 bits, because squares of small gradients would be 0.
        return product(wide(tensor), self.statistics.gradient(name)).double().square()


@dataclass(frozen=True, eq=False)
class snip:  # noqa: N801
    """Score |w g|, with g the mean gradient at initialisation (connection sensitivity).

    See `taylor`.

    Reference: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection
        Sensitivity", 2019, arXiv:1810.02340, equation 5. Differs: not divided by the sum over the
        network, which does not change the order.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return product(wide(tensor), self.statistics.gradient(name)).abs()


@dataclass(frozen=True, eq=False)
class grasp:  # noqa: N801
    """Score w (H g): keep the weights whose removal would reduce the gradient norm most.

    The `collect` block must call `add_curvature(loss)`. See `taylor`.

    Reference: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient
        Flow", 2020, arXiv:2002.07376, equation 8, where the score is -w (H g) and the highest are
        dropped. Differs: sums H g over losses; the paper has one loss of all data.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return product(wide(tensor), self.statistics.hessian_gradient(name))


@dataclass(frozen=True, eq=False)
class synflow:  # noqa: N801
    """Score |w| dR/d|w|, with R the sum of the outputs for ones of the network with |w| for w.

    The `collect` block must call `add_synaptic_flow(ones)`. Prune in many small steps with a new
    block for each, or whole layers may be dropped. See `taylor`.

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
        synaptic flow", 2020, arXiv:2006.05467, equations 1 and 2.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return self.statistics.synaptic_flow(name).to(tensor.device)


@dataclass(frozen=True, eq=False)
class fisher:  # noqa: N801
    """Score w^2 mean(g^2) / 2: the diagonal of the empirical Fisher matrix replaces the Hessian.

    The mean is over backward passes; the paper uses one sample per pass. See `taylor`.

    Reference: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
        arXiv:1801.05787, section 2. Differs: adds the scores of real and imaginary part of a
        complex weight.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        squares = each_part(lambda part: part.square(), wide(tensor))
        diagonal = self.statistics.squared_gradient(name)
        if squares.is_complex():
            return (squares.real * diagonal.real + squares.imag * diagonal.imag) / 2
        return squares * diagonal / 2


@dataclass(frozen=True, eq=False)
class movement:  # noqa: N801
    """Score -sum(w g) over training: high for weights that have moved away from 0.

    The `collect` block must contain the training. See `taylor`.

    Reference: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
        arXiv:2005.07683, section 4. Differs: the mask does not change while scores are summed.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return self.statistics.movement(name)


@dataclass(frozen=True, eq=False)
class wanda:  # noqa: N801
    """Score |w| times the norm of its input, ranked within each output.

    Args:
        statistics: from a `collect` block with forward passes.
        per_output: return the rank among the weights of the same output, in (0, 1], so every output
            keeps the same number. False returns the product itself, for patterns whose units
            contain outputs (`channel(0)`, blocks).

    Raises:
        RuntimeError: on call, if no input of the tensor was collected.

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
        2023, arXiv:2306.11695, equation 1.
    """

    statistics: Statistics
    per_output: bool = True

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        norm = self.statistics.input_norm(name).to(tensor.device)
        scores = wide(tensor).abs() * norm
        # In an embedding, each row is an input, and each column an output.
        by_column = norm.shape != scores.shape and norm.shape[0] > 1
        rows = scores.T if by_column else scores.flatten(1)
        if not self.per_output or rows.shape[1] < 2:
            return scores
        order = rows.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(rows.shape[1], 0, -1, device=rows.device) / rows.shape[1]
        ranked = torch.empty_like(rows).scatter_(1, order, ranks.to(rows).expand_as(rows))
        return ranked.T if by_column else ranked.view_as(scores)


@dataclass(frozen=True, eq=False)
class ria:  # noqa: N801
    """Score |w| / sum over its output + |w| / sum over its input, times the root of the input norm.

    Args:
        statistics: from `collect(..., grams=True)`.

    Raises:
        RuntimeError: on call, if no input of the tensor was collected.

    Reference: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
        Language Models", ICLR 2024. Differs: no permutation of the channels.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        layout = self.statistics.layout(name)
        shares = relative_importance(layout.matrices(wide(tensor).abs()))
        norm = self.statistics.input_norm(name).to(tensor.device)
        return layout.restored(shares, tensor.shape) * norm.sqrt()


def relative_importance(size: Tensor) -> Tensor:
    """Return |w| of (.., out, in) over the sum of its output, plus |w| over that of its input."""
    tiny = torch.finfo(size.dtype).tiny
    by_output = size / size.sum(-1, keepdim=True).clamp(min=tiny)
    return by_output + size / size.sum(-2, keepdim=True).clamp(min=tiny)


@dataclass(frozen=True, eq=False)
class sparsegpt:  # noqa: N801
    """Score w^2 / (H^-1)_jj: the error of the outputs if w goes and the others make up for it.

    H = sum x x^T + damping * mean(diag) I, with the inputs x. Inputs that are always 0 score 0.

    Args:
        statistics: from `collect(..., grams=True)`.
        damping: share of the mean of the diagonal; raised up to 1000 times if H is singular.

    Raises:
        RuntimeError: on call, if no input of the tensor was collected, or H stays singular.

    Reference: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
        One-Shot", 2023, arXiv:2301.00774, equation 3. Differs: scores all weights before any is
        dropped; `OneShot(update="obs")` scores blocks of columns one after the other.
    """

    statistics: Statistics
    damping: float = 0.01

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        layout, gram = self.statistics.layout(name), self.statistics.gram(name)
        hessian = damped(gram.reshape(-1, *gram.shape[-2:]), self.damping)
        inverse = hessian.inverse_diagonal().masked_fill(hessian.dead, float("inf"))
        return wide(tensor).square() / layout.of_inputs(inverse, tensor.shape).to(tensor.device)
