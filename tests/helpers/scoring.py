"""A small network, batches and a loss, for the tests of scores."""

import copy

import torch
from torch import nn

import parasparse as ps


def build(**keywords):
    return nn.Sequential(nn.Linear(6, 5, **keywords), nn.Tanh(), nn.Linear(5, 3, **keywords))


def batches(number=3, dtype=torch.double):
    return [torch.randn(4, 6, dtype=dtype) for _ in range(number)]


def loss_of(out):
    return out.abs().square().mean()


def prune(model, score, sparsity=0.5):
    return ps.sparsify(copy.deepcopy(model), ps.Prune(sparsity, score=score))


def collected():
    """A model, its batches, and the statistics of a pass over them."""
    torch.manual_seed(0)
    model, data = build().double(), batches()
    with ps.scores.collect(model) as statistics:
        for x in data:
            loss_of(model(x)).backward()
    return model, data, statistics
