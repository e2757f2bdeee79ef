"""Recurrent layers lose hidden units: of all gates, layers and directions."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps


class Steps(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        size = (rnn.proj_size or rnn.hidden_size) * (1 + rnn.bidirectional)
        self.head = nn.Linear(size, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


LAYERS = {
    "two layers": lambda: nn.LSTM(5, 6, 2),
    "both directions": lambda: nn.LSTM(5, 6, bidirectional=True),
    "projected": lambda: nn.LSTM(5, 6, 2, proj_size=4),
    "all of it": lambda: nn.LSTM(5, 6, 2, bidirectional=True, proj_size=4, dropout=0.5),
    "gru": lambda: nn.GRU(5, 6, 2, bidirectional=True),
    "rnn without a bias": lambda: nn.RNN(5, 6, 2, bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_hidden_units_of_recurrent_layers_go(name):
    torch.manual_seed(0)
    model = Steps(LAYERS[name]()).double().eval()
    example = torch.randn(3, 2, 5).double()
    units = ps.coupled(model, example)
    masked = copy.deepcopy(ps.sparsify(model, units.rules(0.5)))
    plan = ps.plan_shrink(model, example)
    rnn = ps.shrink(model, example).rnn
    assert rnn.hidden_size == 3
    assert rnn.proj_size in (0, 2)
    fresh = ps.shrink(Steps(LAYERS[name]()).double().eval(), plan)
    fresh.load_state_dict(model.state_dict())
    for x in (example, torch.randn(7, 1, 5).double()):
        for small in (model, fresh):
            torch.testing.assert_close(small(x), masked(x), rtol=1e-10, atol=1e-12)
