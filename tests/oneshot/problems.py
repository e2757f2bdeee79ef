"""Layers with correlated inputs, for the solvers and for NumPy."""

import numpy as np
import torch

from parasparse.oneshot.problem import problem_of
from parasparse.scores.damping import damped
from parasparse.scores.layouts import Layout


def layer(seed=0, outputs=6, inputs=16, samples=200):
    """Weights and inputs, in NumPy."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((inputs, inputs)) / inputs**0.5 + 0.3 * np.eye(inputs)
    x = random.standard_normal((samples, inputs)) @ mixing
    return random.standard_normal((outputs, inputs)), x * np.exp(random.standard_normal(inputs))


def problem(weights, x, damping=0.01, held=None, name="w"):
    """The same for our solvers, in float64."""
    gram = torch.from_numpy(x.T @ x)[None]
    return problem_of(name, torch.from_numpy(weights), held, Layout(), damped(gram, damping))


def error_of(problem, weights):
    """The squared change of the outputs, damped."""
    change = weights - problem.weights
    return float(((change @ problem.hessian.matrix) * change).sum())
