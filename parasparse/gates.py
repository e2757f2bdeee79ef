"""Gates: the functions of learned soft masks, and their penalties.

They get noise as an argument. Without noise, they compute the gate of the trained network.
"""

import math
from typing import Any

import torch
from torch import Tensor

from parasparse.counts import check_sparsity
from parasparse.sharding.dtensors import full_tensor, laid_out_like


def sigmoid(
    logits: Tensor, temperature: Tensor | float = 1.0, *, init: float = 0.0, hard: bool = False
) -> Tensor:
    """Return the gate of Continuous Sparsification, or its limit for T -> inf.

    m = sigmoid(T s) / sigmoid(s0); in the limit (s > 0) / sigmoid(s0).

    Args:
        logits: s, real, any shape.
        temperature: T > 0. The higher it is, the closer the mask is to 0 or 1 / sigmoid(s0).
        init: s0, the initial value of all logits, at which the mask is 1 for T = 1.
        hard: return the limit, which has no gradient.

    Examples:
        >>> sigmoid(torch.tensor([-1.0, 0.0, 2.0]), hard=True).tolist()
        [0.0, 0.0, 2.0]

    Reference: Savarese, Silva, Maire, "Winning the Lottery with Continuous Sparsification", 2019,
        arXiv:1912.04427, section 3.
    """
    if hard:
        # Rounds the scale once, in the dtype of the logits, as the soft gate does.
        return (logits > 0).to(logits.dtype) / torch.sigmoid(logits.new_tensor(init))
    # At least 32 bits, because a temperature may be too high for half precision.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = torch.sigmoid(temperature * wide).to(logits.dtype)
    return soft / torch.sigmoid(logits.new_tensor(init))


def hard_concrete(
    logits: Tensor,
    noise: Tensor | None = None,
    *,
    temperature: float = 2 / 3,
    low: float = -0.1,
    high: float = 1.1,
) -> Tensor:
    """Return the gate of L0 regularisation, a stretched sigmoid cut off at exactly 0 and 1.

    z = clamp(sigmoid((log u - log(1 - u) + s) / beta) (high - low) + low, 0, 1); without noise
    clamp(sigmoid(s) (high - low) + low, 0, 1).

    Args:
        logits: s, the paper's log alpha; real, any shape.
        noise: u, uniform in (0, 1), of the shape of the logits.
        temperature: beta > 0.
        low: gamma < 0.
        high: zeta > 1.

    Examples:
        >>> hard_concrete(torch.tensor([-5.0, 0.0, 5.0])).tolist()
        [0.0, 0.5, 1.0]

    Reference: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0
        Regularization", 2018, arXiv:1712.01312, equations 10, 11 and 13.
    """
    if noise is not None:
        logits = (noise.log() - (-noise).log1p() + logits) / temperature
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0.0, 1.0)


def hard_concrete_penalty(
    logits: Tensor, *, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1
) -> Tensor:
    """Return the probability that each gate is not 0: sigmoid(s - beta log(-low / high)).

    See `hard_concrete` for the arguments.

    Examples:
        >>> [round(p, 2) for p in hard_concrete_penalty(torch.tensor([-5.0, 5.0])).tolist()]
        [0.03, 1.0]

    Reference: Louizos, Welling, Kingma, 2018, arXiv:1712.01312, equation 12.
    """
    return torch.sigmoid(logits - temperature * math.log(-low / high))


def straight_through(scores: Tensor, sparsity: Tensor | float) -> Tensor:
    """Return the mask of the highest scores, and pass its gradient to the scores.

    m = 1 for the n - round(n * sparsity) highest scores (the lower index wins ties), else 0;
    dm/ds = 1.

    Args:
        scores: s, real, any shape.
        sparsity: share of zeros, in [0, 1]. A change of a tensor does not recompile.

    Examples:
        >>> scores = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
        >>> mask = straight_through(scores, 1 / 3)
        >>> mask.sum().backward()
        >>> mask.tolist(), scores.grad.tolist()
        ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0])

    Reference: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
        arXiv:2005.07683, section 4. Bengio, Leonard, Courville, 2013, arXiv:1308.3432.
    """
    if not isinstance(sparsity, Tensor):
        sparsity = torch.tensor(check_sparsity(sparsity), dtype=torch.float64)
    flat = full_tensor(scores.detach()).flatten()
    kept = flat.numel() - (flat.numel() * sparsity.double()).round()  # num_kept, half to even
    ranks = flat.argsort(descending=True, stable=True).argsort()
    mask = (ranks < kept.to(ranks.device)).to(scores.dtype).view(scores.shape)
    return laid_out_like(mask, scores) + (scores - scores.detach())


def soft_threshold(weight: Tensor, logits: Tensor) -> Tensor:
    """Return sign(w) relu(|w| - sigmoid(s)): magnitudes below a learned threshold become 0.

    Args:
        weight: w, real, or complex with sign(w) = w / |w|.
        logits: s, real; broadcasts to the shape of the weight, such as one value or one per row.

    Examples:
        >>> soft_threshold(torch.tensor([-0.75, 0.25]), torch.tensor(0.0)).tolist()
        [-0.25, 0.0]

    Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity",
        2020, arXiv:2002.03231, equation 4.
    """
    return weight.sgn() * (weight.abs() - torch.sigmoid(logits)).relu()


def variational_dropout(
    weight: Tensor, log_variance: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Return w + sigma e, a weight with noise of a learned variance, or w without noise.

    Args:
        weight: w, the mean; real or complex.
        log_variance: log sigma^2, real, of the shape of the weight.
        noise: e, from `torch.randn_like(weight)`: standard normal, with mean |e|^2 = 1 if complex.

    Examples:
        >>> w = torch.tensor([1.0, 2.0])
        >>> variational_dropout(w, torch.zeros(2), noise=torch.tensor([0.5, -1.0])).tolist()
        [1.5, 1.0]

    Reference: Molchanov, Ashukha, Vetrov, "Variational Dropout Sparsifies Deep Neural Networks",
        2017, arXiv:1701.05369, section 4.2. Nazarov, Burnaev, "Bayesian Sparsification of Deep
        C-valued Networks", 2020, arXiv:2003.11413. Differs: weights are drawn instead of the
        outputs of layers, so this works with any layer.
    """
    return weight if noise is None else weight + (log_variance / 2).exp() * noise


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """Return log alpha = log(sigma^2 / |w|^2), which is high where noise dominates the weight.

    See `variational_dropout` for the arguments.

    Examples:
        >>> log_alpha(torch.tensor([1.0, 0.5]), torch.zeros(2)).tolist()
        [0.0, 1.3862943649291992]

    Reference: Molchanov, Ashukha, Vetrov, 2017, arXiv:1701.05369, section 4.1.
    """
    tiny = max(1e-12, torch.finfo(log_variance.dtype).tiny)
    return log_variance - 2 * (weight.abs() + tiny).log()


def variational_dropout_penalty(relevance: Tensor, *, is_complex: bool = False) -> Tensor:
    """Return KL(q || log-uniform prior) for each weight, up to a constant: 0 for alpha -> inf.

    Real: k1 (1 - sigmoid(k2 + k3 log alpha)) + log(1 + 1/alpha) / 2, within 0.01 of the KL;
    complex: gamma + log(1/alpha) - Ei(-1/alpha), exact.

    Args:
        relevance: log alpha, from `log_alpha`.
        is_complex: whether the weights are complex.

    Examples:
        >>> x = torch.tensor([-8.0, 8.0])
        >>> [round(k, 3) for k in variational_dropout_penalty(x).tolist()]
        [4.636, 0.0]

    Reference: Molchanov, Ashukha, Vetrov, 2017, arXiv:1701.05369, equation 14. Nazarov, Burnaev,
        2020, arXiv:2003.11413, section 3.
    """
    if is_complex:
        # exp overflows 64 bits above about 700, where the penalty is linear.
        x = relevance.double().neg().clamp(max=700.0).exp()
        beyond = (-relevance.double() - 700.0).relu()
        return (_Ein.apply(x) + beyond).to(relevance.dtype)  # type: ignore[no-any-return]
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    near = k1 * torch.sigmoid(-(k2 + k3 * relevance))
    return near + torch.nn.functional.softplus(-relevance) / 2


class _Ein(torch.autograd.Function):
    """Ein(x) = gamma + log x - Ei(-x), the integral of (1 - exp(-t)) / t from 0 to x >= 0.

    Reference: Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964, 5.1.11 and 5.1.22.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        wide = x.double()
        small, large = wide.clamp(max=4.0), wide.clamp(min=4.0)
        series, term = torch.zeros_like(wide), torch.ones_like(wide)
        for k in range(1, 40):
            term = -term * small / k
            series = series - term / k
        # exp(x) E1(x) as a continued fraction, from its end.
        fraction = large.clone()
        for k in range(60, 0, -1):
            fraction = large + k / (1 + k / fraction)
        integral = _EULER + large.log() + (-large).exp() / fraction
        return torch.where(wide < 4, series, integral).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = torch.where(x < 1e-6, 1 - x / 2, -(-x).expm1() / x.clamp(min=1e-6))
        return grad * slope

    jvp = backward


_EULER = 0.57721566490153286061
