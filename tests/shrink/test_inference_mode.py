"""Inference mode, around the call or inside the model, changes nothing."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps


class Inferring(nn.Module):
    """A network, a part of which runs in inference mode."""

    def __init__(self, inside):
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(4, 8), nn.Conv1d(8, 6, 1), nn.Linear(6, 2)
        self.inside = inside

    def forward(self, x):
        with torch.inference_mode(self.inside):
            h = self.conv(self.first(x).relu().unsqueeze(-1)).squeeze(-1)
        return self.last(h.clone().relu())


@pytest.mark.parametrize(("around", "inside"), [(True, False), (False, True), (True, True)])
def test_inference_mode_changes_nothing(around, inside):
    model, x = Inferring(inside), torch.randn(2, 4)
    with torch.inference_mode(around):
        units = ps.coupled(model, torch.randn(1, 4))
    ps.sparsify(model, units.rules(0.5))
    masked = copy.deepcopy(model)
    with torch.inference_mode(around):
        assert ps.plan_shrink(model, torch.randn(1, 4)).rows
        ps.shrink(model, torch.randn(1, 4))
    assert (model.first.out_features, model.conv.out_channels) == (4, 3)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))
    if not inside:
        model(x).sum().backward()
        assert model.first.weight.grad.shape == (4, 4)
