"""Scores that need gradients, curvature or inputs, which `collect` has seen.

w g stands for Re(conj(g) w) where a weight is complex: how the loss changes along w.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.scores.products import each_part, product, wide
from parasparse.scores.statistics import Statistics


@dataclass(frozen=True, eq=False)
class taylor:  # noqa: N801 - a score reads as a function
    """Score (w g)^2, with g the mean gradient: the change of the loss without w, squared.

    Args:
        statistics: of backward passes.

    Raises:
        RuntimeError: on call: no gradient of the tensor was collected.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
        arXiv:1906.10771, equation 8. Differs: of the mean gradient; the paper's program takes the
        mean of what batches give, which is twice `fisher`.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        # In 64 bits: squares of small gradients would all be 0.
        return product(wide(tensor), self.statistics.gradient(name)).double().square()


@dataclass(frozen=True, eq=False)
class snip:  # noqa: N801
    """Score |w g|, with g the mean gradient at initialisation: connection sensitivity.

    Args:
        statistics: of backward passes.

    Raises:
        RuntimeError: on call: no gradient of the tensor was collected.

    Reference: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection
        Sensitivity", 2019, arXiv:1810.02340, equation 5. Differs: not divided by the sum over the
        network, which changes no ranking.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return product(wide(tensor), self.statistics.gradient(name)).abs()


@dataclass(frozen=True, eq=False)
class grasp:  # noqa: N801
    """Score w (H g): what is kept is what the flow of gradients would lose most without.

    Args:
        statistics: with `add_curvature(loss)`.

    Raises:
        RuntimeError: on call: no curvature was added.

    Reference: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient
        Flow", 2020, arXiv:2002.07376, equation 8, whose score, higher = drop, is -w (H g). Differs:
        sums H g of each loss; the paper has one loss of all data.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return product(wide(tensor), self.statistics.hessian_gradient(name))


@dataclass(frozen=True, eq=False)
class synflow:  # noqa: N801
    """Score |w| dR/d|w|, with R the sum of outputs of the network with |w| for w, fed with ones.

    Prune in many small steps, `add_synaptic_flow` before each: that is what keeps layers alive.

    Args:
        statistics: with `add_synaptic_flow(ones)`.

    Raises:
        RuntimeError: on call: no flow was added.

    Reference: Tanaka et al., "Pruning neural networks without any data by iteratively conserving
        synaptic flow", 2020, arXiv:2006.05467, equations 1 and 2.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return self.statistics.synaptic_flow(name).to(tensor.device)


@dataclass(frozen=True, eq=False)
class fisher:  # noqa: N801
    """Score w^2 mean(g^2) / 2: with the diagonal of the empirical Fisher matrix for the Hessian.

    The mean is over backward passes: batches of one give the paper's.

    Args:
        statistics: of backward passes.

    Raises:
        RuntimeError: on call: no gradient of the tensor was collected.

    Reference: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
        arXiv:1801.05787, section 2. Differs: of a complex weight, the real and the imaginary part
        each by itself.
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
    """Score -sum(w g) over training: high where weights have moved away from 0.

    Args:
        statistics: of the backward passes of training.

    Raises:
        RuntimeError: on call: no gradient of the tensor was collected.

    Reference: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
        arXiv:2005.07683, section 4. Differs: the mask stays while scores are summed; theirs moves.
    """

    statistics: Statistics

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        return self.statistics.movement(name)


@dataclass(frozen=True, eq=False)
class wanda:  # noqa: N801
    """Score |w| times the norm of its input, the weights of each output ranked by themselves.

    Args:
        statistics: of forward passes.
        per_output: return the rank among the weights of the same output, in (0, 1], so that each
            output keeps as many as the others. False: the product itself, which patterns that join
            outputs (`channel(0)`, blocks) need.

    Raises:
        RuntimeError: on call: no input of the tensor was collected.

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
        2023, arXiv:2306.11695, equation 1.
    """

    statistics: Statistics
    per_output: bool = True

    def __call__(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the scores of `tensor`."""
        norm = self.statistics.input_norm(name).to(tensor.device)
        scores = wide(tensor).abs() * norm
        # Of an embedding each row is an input, and each column an output.
        by_column = norm.shape != scores.shape and norm.shape[0] > 1
        rows = scores.T if by_column else scores.flatten(1)
        if not self.per_output or rows.shape[1] < 2:
            return scores
        order = rows.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(rows.shape[1], 0, -1, device=rows.device) / rows.shape[1]
        ranked = torch.empty_like(rows).scatter_(1, order, ranks.to(rows).expand_as(rows))
        return ranked.T if by_column else ranked.view_as(scores)
