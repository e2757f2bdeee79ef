"""Masks that torch has put into lists of its own, as `prepare_qat` does."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations, parametrize

import parasparse as ps

pytestmark = pytest.mark.filterwarnings("ignore")  # torch deprecates its quantization

X = torch.randn(3, 6)


def for_quantization(treatment):
    model = nn.Sequential(nn.Linear(6, 4)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(ps.sparsify(model, treatment))


def for_quantization_by_fx(treatment):
    settings = quantization.get_default_qat_qconfig_mapping("fbgemm")
    model = ps.sparsify(nn.Sequential(nn.Linear(6, 4)).train(), treatment)
    return quantize_fx.prepare_qat_fx(model, settings, (X,))


def transferred(treatment):
    model = nn.Sequential(nn.Linear(6, 4))
    masked = ps.sparsify(nn.Linear(6, 4), treatment)
    parametrize.transfer_parametrizations_and_params(masked, model[0])
    return model


def registered(treatment):
    model = nn.Sequential(nn.Linear(6, 4))
    mask = ps.sparsify(copy.deepcopy(model), treatment)[0].parametrizations.weight[0]
    parametrize.register_parametrization(model[0], "weight", mask)
    return model


def registered_over_another(treatment):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)))
    mask = ps.sparsify(copy.deepcopy(model), treatment)[0].parametrizations.weight[-1]
    parametrize.register_parametrization(model[0], "weight", mask)
    return model


MAKERS = [
    for_quantization, for_quantization_by_fx, transferred, registered, registered_over_another,
]  # fmt: skip
over_makers = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def layer_of(model):
    return model.get_submodule("0")


def base_of(model):
    return parametrize.type_before_parametrizations(layer_of(model))


@over_makers
@pytest.mark.parametrize("treatment", [0.5, ps.Gate(init=1.0)], ids=["mask", "gate"])
def test_they_are_found_by_the_first_verb_that_looks(make, treatment):
    model = make(treatment)
    stack = layer_of(model).parametrizations.weight
    assert type(stack) is parametrize.ParametrizationList
    weight, base, keys = (
        layer_of(model).weight.detach().clone(),
        base_of(model),
        {*model.state_dict()},
    )
    parameters = [id(parameter) for parameter in model.parameters()]
    assert ps.is_sparse(model)
    assert [row.name for row in ps.summary(model).rows] == ["0.weight"]
    assert torch.equal(layer_of(model).weight, weight)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert {*model.state_dict()} == keys
    assert base_of(model) is base
    ps.squash(model)
    assert not ps.is_sparse(model)
    assert torch.equal(layer_of(model).weight, weight)
    assert isinstance(layer_of(model).weight, nn.Parameter)
    assert type(layer_of(model)) is base
    assert not [key for key in model.state_dict() if "parametrizations" in key]


VERBS = {
    "named_masks": lambda model: dict(ps.named_masks(model))["0.weight"],
    "mask_of": lambda model: ps.mask_of(model, "0.weight"),
    "stored": lambda model: ps.stored(model, "0.weight") != 0,
    "dense_state_dict": lambda model: ps.dense_state_dict(model)["0.weight"],
    "unsparsify": ps.unsparsify,
    "binarize": ps.binarize,
    "plan": lambda model: ps.plan(model, 0.75),
    "sparsify": lambda model: ps.sparsify(model, 0.75),
    "deploy_masks": lambda model: ps.deploy_masks(model, {"0.weight": torch.ones(4, 6)}),
    "load_state_dict": lambda model: ps.load_state_dict(model, ps.dense_state_dict(model)),
}


@over_makers
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_does_what_it_does_to_a_masked_model(make, verb):
    def done(looked_at):
        torch.manual_seed(0)
        model = make([{"0.weight": 0.5}, {"weight": 0.5}][make is transferred])
        if looked_at:
            assert ps.is_sparse(model)
        result = VERBS[verb](model)
        return (result if isinstance(result, torch.Tensor) else 0), model.state_dict()

    (result, state), (expected, after) = done(False), done(True)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(state, after)


@over_makers
def test_they_freeze_collect_dense_gradients_and_train(make):
    model = make(0.5)
    with torch.no_grad(), ps.frozen(model):
        assert layer_of(model).weight is layer_of(model).weight
    model = make(0.5)
    with ps.dense_gradients(model) as gradients:
        layer_of(model)(X).sum().backward()
    assert gradients["0.weight"].count_nonzero() > 12


@pytest.mark.parametrize("verb", [ps.is_sparse, ps.summary, ps.squash, lambda m: ps.plan(m, 0.5)])
def test_a_mask_below_another_parametrization_is_refused(verb):
    layer = nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", ps.Mask(layer.weight, layer.weight > 0))
    parametrizations.spectral_norm(layer)
    weight = layer.eval().weight
    with pytest.raises(ValueError, match="must be its last parametrization; got _SpectralNorm"):
        verb(layer)
    assert torch.equal(layer.weight, weight)


def test_a_recurrent_layer_reads_a_registered_mask_as_one_that_is_attached():
    layer, x = nn.LSTM(4, 4), torch.randn(3, 2, 4)
    name, weight = "weight_hh_l0", layer.weight_hh_l0
    parametrize.register_parametrization(layer, name, ps.Mask(weight, weight > 0))
    expected = layer(x)[0]
    assert ps.is_sparse(layer)
    assert torch.equal(layer(x)[0], expected)
    assert torch.equal(ps.squash(layer)(x)[0], expected)
