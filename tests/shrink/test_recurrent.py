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


@pytest.mark.parametrize(("dropped", "hidden"), [(2, 4), (4, 6)])
def test_an_lstm_keeps_more_hidden_units_than_it_projects_to(dropped, hidden):
    """Or torch reads its parameters as those of one without projections."""
    torch.manual_seed(0)
    model, x = Steps(nn.LSTM(5, 6, proj_size=3)).double(), torch.randn(4, 2, 5).double()
    unread = {"rnn.weight_hr_l0": ps.Prune(dropped / 6, pattern=ps.patterns.channel(1))}
    masked = copy.deepcopy(ps.sparsify(model, unread))
    if hidden < 6:
        ps.shrink(model, x)
    else:
        assert "a comparison of how many" in str(ps.plan_shrink(model, x))
    assert model.rnn.hidden_size == hidden
    torch.testing.assert_close(model(x + 1), masked(x + 1))


@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_a_cell_without_hidden_values_has_one_size(kind):
    torch.manual_seed(0)
    cell = nn.RNNCell(5, 8, nonlinearity=kind)
    model, x = nn.Sequential(nn.Linear(3, 5), cell, nn.Linear(8, 2)).double(), torch.randn(4, 3)
    x = x.double()
    masked = copy.deepcopy(ps.sparsify(model, ps.coupled(model, x).rules(0.5)))
    assert ps.shrink(model, x)[1].weight_hh.shape == (4, 4)
    assert cell.hidden_size == 4
    torch.testing.assert_close(model(x + 1), masked(x + 1))
