"""Support and weights chosen together, by the alternating direction method of multipliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parasparse.oneshot.problem import Problem
from parasparse.oneshot.supports import Support

_FIRST = 0.1  # rho at the start, in columns of unit variance


@dataclass(eq=False)
class _State:
    """One layer, with inputs scaled to unit variance.

    X fits the outputs, `sparse` is its sparse copy D, and `dual` the multiplier V of X = D.
    `scaled` is W, `wanted` is W H, and `values` and `vectors` are the eigenvalues and eigenvectors
    of H.
    `inverse` is that of H + rho.
    """

    problem: Problem
    values: Tensor
    vectors: Tensor
    wanted: Tensor
    scaled: Tensor
    sparse: Tensor
    dual: Tensor
    mask: Tensor
    rho: float = 0.0
    inverse: Tensor | None = None

    def fit(self, rho: float) -> Tensor:
        """Return X + V / rho for the X nearest to the outputs and to D."""
        unseen = self.problem.hessian.unseen
        if bool(unseen.all()):
            return self.scaled
        if self.inverse is None or rho != self.rho:  # it stays for some iterations
            self.inverse = (self.vectors / (self.values + rho)) @ self.vectors.mT
            self.rho = rho
        near = self.wanted + rho * self.sparse - self.dual
        total = near @ self.inverse + self.dual / rho
        # Without inputs there is nothing to fit, and the largest weights stay.
        return torch.where(unseen[:, None, None], self.scaled, total)

    def project(self, total: Tensor, mask: Tensor, rho: float) -> int:
        """Set D and V; return how many entries of the mask have moved."""
        moved = int((mask != self.mask).sum())
        self.sparse, self.mask = total * mask, mask
        self.dual = rho * (total - self.sparse)
        return moved


def admm(problems: list[Problem], support: Support, iterations: int = 300) -> dict[str, Tensor]:
    """Return masks (groups, out, in) whose least squares weights have small errors.

    Several problems are solved together: in each iteration, `support` ranks all of them.

    Reference: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
        Large Language Models", 2024, arXiv:2406.07831, section 3. Differs: scales inputs to
        unit variance, chooses any pattern and scope, and raises rho by other steps.
    """
    states = [_start(problem) for problem in problems]
    _choose(states, support, [state.sparse for state in states], _FIRST)
    size = sum(state.mask.numel() for state in states)
    kept = sum(int(state.mask.sum()) for state in states)
    rho, still = _FIRST, 0
    for iteration in range(iterations):
        moved = _choose(states, support, [state.fit(rho) for state in states], rho)
        if iteration % 3 == 2:
            rho *= _growth(moved, size, kept)
        still = still + 1 if moved <= kept // 1000 else 0
        if still > 3:
            break
    return {state.problem.name: state.mask for state in states}


def _choose(states: list[_State], support: Support, totals: list[Tensor], rho: float) -> int:
    scores = {s.problem.name: t.abs() for s, t in zip(states, totals, strict=True)}
    masks = support.masks(scores, [state.problem for state in states])
    return sum(
        state.project(total, masks[state.problem.name], rho)
        for state, total in zip(states, totals, strict=True)
    )


def _growth(moved: int, size: int, kept: int) -> float:
    """Return the factor of rho: the fewer entries still move, the smaller."""
    if moved > 0.1 * size:
        return 1.3
    if moved > 0.005 * kept:
        return 1.2
    return 1.1 if moved > 1 else 1.05


def _start(problem: Problem) -> _State:
    weights, hessian = problem.weights, problem.hessian
    scale = hessian.scale.unsqueeze(-2)
    values, vectors = (part.to(weights) for part in hessian.eigen)
    wanted = (weights.to(scale) @ (hessian.matrix / scale)).to(weights)
    scaled = weights * scale.to(weights)
    empty = torch.zeros_like(weights)
    return _State(
        problem, values.unsqueeze(-2), vectors, wanted, scaled, scaled, empty, empty.bool()
    )
