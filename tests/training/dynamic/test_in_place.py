"""Training by momentum reads Parameters themselves: their masked entries stay 0, whoever looks."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.training import build, sgd, train


def trained_by_momentum():
    torch.manual_seed(0)
    model = build()
    optimizer = sgd(model, momentum=0.9, weight_decay=1e-2)
    dst = ps.sparse_momentum(model, 0.7, optimizer, stop=100, every=3)
    train(model, optimizer, dst, 5)
    return model, optimizer, dst


def with_stack(name):
    return "{}.parametrizations.{}.original".format(*name.rsplit(".", 1))


def layers_of(model):
    """Yield the layer, the stored Parameter and the mask of each masked weight."""
    parameters = dict(model.named_parameters())
    for name, mask in ps.named_masks(model):
        yield model.get_submodule(name.rpartition(".")[0]), parameters[with_stack(name)], mask


def test_training_by_momentum_reads_the_parameter_itself_and_evaluation_a_copy():
    model, *_ = trained_by_momentum()
    for layer, parameter, mask in layers_of(model):
        assert layer.weight is parameter
        with torch.no_grad():
            assert layer.weight is not parameter
        assert copy.deepcopy(layer).weight[~mask].eq(0).all()
        assert pickle.loads(pickle.dumps(layer)).weight[~mask].eq(0).all()


@pytest.mark.parametrize("value", [-1.0, -0.0, math.inf, math.nan])
@pytest.mark.parametrize("way", ["in place", "data", "loaded"])
def test_whatever_is_written_to_masked_entries_is_read_as_0(way, value):
    model, *_ = trained_by_momentum()
    x = torch.randn(8, 12)
    model(x)
    for name, mask in ps.named_masks(model):
        layer = model.get_submodule(name.rpartition(".")[0])
        parameter = layer.parametrizations.weight.original
        kept = parameter.detach().clone()
        written = torch.where(mask, kept, value)
        if way == "in place":
            with torch.no_grad():
                parameter.copy_(written)
        elif way == "data":
            parameter.data[:] = written
        else:
            model.load_state_dict({name: written}, strict=False)
        torch.testing.assert_close(parameter.detach(), written, rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            assert torch.equal(layer.weight, kept)
        assert torch.equal(layer.weight, kept)
        assert not layer.weight[~mask].signbit().any()


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("way", ["parameters", "state_dict", "unsparsify", "more connections"])
def test_masked_entries_are_0_after_each_step(way, evaluated):
    model, *_ = trained_by_momentum()
    masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
    if evaluated:
        with torch.no_grad():
            model(torch.randn(8, 12))
    if way == "state_dict":
        found = {name: model.state_dict()[with_stack(name)] for name in masks}
    elif way == "unsparsify":
        found = ps.unsparsify(model).state_dict()
    elif way == "more connections":
        found = dict(ps.dense_state_dict(ps.sparsify(model, 0.1)))
    else:
        found = {name: dict(model.named_parameters())[with_stack(name)] for name in masks}
    assert not any(found[name][~mask].any() for name, mask in masks.items())


def test_what_is_looked_at_between_forward_and_backward_changes_nothing():
    model, *_ = trained_by_momentum()
    loss = model(torch.randn(8, 12)).square().mean()
    model.state_dict(), ps.summary(model)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("look", [False, True])
def test_compiled_training_is_the_same_whether_weights_are_looked_at_or_not(look):
    model, optimizer, dst = trained_by_momentum()
    twin, other, control = copy.deepcopy((model, optimizer, dst))
    run = torch.compile(model, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(8, 12)
        for net, made, controller in ((run, optimizer, dst), (twin, other, control)):
            made.zero_grad()
            net(x).square().mean().backward()
            made.step()
            controller.step()
        if look:
            [layer.weight for layer, *_ in layers_of(model)]
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)
        momenta = (made.state[p]["momentum_buffer"] for made, p in ((optimizer, one), (other, two)))
        torch.testing.assert_close(*momenta)


def test_gradients_accumulate_over_readings_of_one_parameter():
    model, *_ = trained_by_momentum()
    twin = copy.deepcopy(model)  # which reads by copies
    assert not any(layer.weight is parameter for layer, parameter, _ in layers_of(twin))
    x = torch.randn(8, 12)
    for net in (model, twin):
        net.zero_grad()
        one, two = net(x), net(2 * x)  # both are read before either is differentiated
        (one.square().mean() + two.square().mean()).backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("part", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conj", "neg"])
def test_parameters_that_are_lazily_conjugated_or_negated_train(part):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(part(torch.randn(4, 4, dtype=torch.cfloat)))
    x = torch.randn(3, 4, dtype=layer.weight.dtype)
    optimizer = sgd(layer)
    dst = ps.DynamicSparsity(layer, 0.5, optimizer, every=1)
    for _ in range(2):
        nn.functional.linear(x, layer.weight).abs().square().mean().backward()
        optimizer.step()
        dst.step()
    assert int((layer.weight != 0).sum()) <= 8
