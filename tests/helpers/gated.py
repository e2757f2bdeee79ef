"""Layers with a gate of each kind."""

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse import gates


def softplus(logits):
    """A gate of a user's own, as a function."""
    return nn.functional.softplus(logits)


class Cubed(ps.ProductGate):
    """A gate of a user's own, as a class."""

    init = 1.0

    def multiplier(self, mask, noise):
        return mask.logits**3

    def penalty(self, mask, weight):
        return mask.spread(mask.logits.abs()).sum()


GATES = {
    "sigmoid": ps.Gate(init=0.2),
    "hard_concrete": ps.Gate(gates.hard_concrete, init=0.5),
    "straight_through": ps.Gate(gates.straight_through, sparsity=0.5),
    "soft_threshold": ps.Gate(gates.soft_threshold, init=-2.0),
    "variational_dropout": ps.Gate(gates.variational_dropout, init=-3.0),
    "channels": ps.Gate(init=0.2, pattern=ps.patterns.channel(0)),
    "blocks": ps.Gate(gates.hard_concrete, pattern=ps.patterns.block((2, 2))),
    "rows": ps.Gate(gates.soft_threshold, init=-1.0, pattern=ps.patterns.channel(0)),
    "function": ps.Gate(softplus, init=0.3),
    "class": ps.Gate(Cubed()),
    "class_of_units": ps.Gate(Cubed(), pattern=ps.patterns.channel(0)),
    "units": ps.Gate(gates.straight_through, sparsity=0.5, pattern=ps.patterns.channel(1)),
}


DRAWS = {"hard_concrete", "variational_dropout", "blocks"}


KINDS = {name: GATES[name] for name in list(GATES)[:5]}  # by entry


all_kinds = pytest.mark.parametrize("kind", KINDS)


all_gates = pytest.mark.parametrize("name", GATES)


def gated(name, dtype=torch.double):
    """A trained-looking layer: its logits differ."""
    torch.manual_seed(0)
    model = ps.sparsify(nn.Linear(6, 4, dtype=dtype), GATES[name])
    with torch.no_grad():
        logits = mask_of(model).logits
        logits.add_(torch.randn_like(logits))
    return model


def mask_of(model):
    return model.parametrizations.weight[-1]
