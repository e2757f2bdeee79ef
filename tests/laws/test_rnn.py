"""RNNs, which keep a list of their weights."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import parasparse as ps


def test_an_rnn_follows_its_masks_and_training():
    model = nn.LSTM(4, 5)
    x = torch.randn(3, 2, 4)
    ps.sparsify(model, {"weight_hh_l0": 0.5})
    first = model(x)[0]
    ps.deploy_masks(model, {"weight_hh_l0": torch.tensor(0.0)})
    twin = nn.LSTM(4, 5)
    twin.load_state_dict(ps.dense_state_dict(model))
    assert torch.equal(model(x)[0], twin(x)[0])
    assert not torch.equal(model(x)[0], first)
    with torch.no_grad():
        model.bias_ih_l0.add_(1.0)
        ps.stored(model, "weight_hh_l0").zero_()
    twin.load_state_dict(ps.dense_state_dict(model))
    assert torch.equal(model(x)[0], twin(x)[0])
    torch.testing.assert_close(model.double()(x.double())[0].float(), twin(x)[0])
    model.float()
    ps.squash(model)
    assert torch.equal(model(x)[0], twin(x)[0])


def test_an_rnn_deepcopies_after_a_forward_with_gradients():
    model = ps.sparsify(nn.GRU(4, 5), 0.5)
    x = torch.randn(3, 2, 4)
    out = model(x)[0]
    assert torch.equal(copy.deepcopy(model)(x)[0], out)


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_forward_of_an_rnn_masks_each_weight_once(build):
    model = ps.sparsify(build(4, 5, num_layers=2, bidirectional=True), 0.5)
    calls = []
    for _, stack in model.parametrizations.items():
        stack[0].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(3, 2, 4))
    assert len(calls) == len(model.parametrizations) == 8
    dense = build(4, 5, num_layers=2, bidirectional=True)
    for wrong in (torch.randn(3, 2, 4).double(), torch.randn(3, 2, 3)):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            dense(wrong)
        with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
            model(wrong)


def test_an_rnn_that_checks_its_input_itself_keeps_doing_so():
    class Strict(nn.GRU):
        def check_input(self, x, batch_sizes):
            super().check_input(x, batch_sizes)
            if x.size(1) != 2:
                raise ValueError("two sequences")

    model = ps.sparsify(Strict(4, 5), 0.5)
    model(torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match="two sequences"):
        model(torch.randn(3, 3, 4))


def test_frozen_brings_an_rnn_to_one_evaluation():
    model = ps.sparsify(nn.LSTM(4, 5), {"weight_hh_l0": 0.5})
    calls = []
    model.parametrizations.weight_hh_l0[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), ps.frozen(model):
        model(torch.randn(3, 2, 4))
        model(torch.randn(3, 2, 4))
    assert len(calls) == 1


def test_an_rnn_lives_on_when_ours_goes_before_a_stock_parametrization():
    model, x = nn.GRU(4, 5), torch.randn(3, 2, 4)
    ps.sparsify(model, {"weight_hh_l0": 0.5})
    parametrize.register_parametrization(model, "bias_hh_l0", nn.Identity())
    expected = model(x)[0]
    ps.squash(model)
    assert torch.equal(model(x)[0], expected)
    parametrize.remove_parametrizations(model, "bias_hh_l0")
    assert torch.equal(model(x)[0], expected)
