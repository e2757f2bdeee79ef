"""A small network, its training and its masks, for the tests of controllers."""

import torch
from torch import nn

import parasparse as ps


def build():
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 5))


def sgd(model, **keywords):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **keywords})


def train(model, optimizer, dst, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        dst.step()


def masks_of(model):
    return {name: mask.clone() for name, mask in ps.named_masks(model)}


def total(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def dense_twin(model):
    """A dense network with the weights that `model` has now."""
    twin = build()
    twin.load_state_dict(ps.dense_state_dict(model))
    return twin
