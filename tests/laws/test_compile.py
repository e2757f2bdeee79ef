"""Graphs: as many as when dense, none anew when masks change."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import parasparse as ps
from tests.helpers.machine import need_inductor


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def frames(model):
    counter = CompileCounter()
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    model(torch.randn(2, 8))
    torch._dynamo.reset()
    return counter.frame_count


# Dynamo looks at the .grad of what the first block hands to the second, masked or not.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_twelve_equal_blocks_compile_in_as_many_frames_as_when_dense():
    model = nn.Sequential(*(Block() for _ in range(12)))
    sparse = ps.sparsify(copy.deepcopy(model), 0.5)
    assert frames(sparse) == frames(model)


def test_changing_masks_and_weights_compiles_nothing_anew_and_shows():
    model = ps.sparsify(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), 0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 8)
    compiled(x).sum().backward()
    first = counter.frame_count
    for sparsity in (0.1, 0.9):
        ps.sparsify(model, sparsity)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == first


def test_the_temperature_and_the_hard_switch_of_a_gate():
    model = ps.sparsify(nn.Linear(8, 8), ps.Gate())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 8)
    for temperature in (1.0, 2.0, 3.0):
        model.parametrizations.weight[0].temperature.fill_(temperature)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_dense_gradients_under_one_graph():
    model = ps.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), 0.5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 8)
    twin = ps.squash(copy.deepcopy(model))
    twin(x).pow(2).sum().backward()
    for _ in range(3):
        compiled(x).sum()
        model.zero_grad()
        with ps.dense_gradients(model) as grads:
            compiled(x).pow(2).sum().backward()
        torch.testing.assert_close(grads["0.weight"], twin[0].weight.grad)
        mask = ps.mask_of(model, "0.weight")
        torch.testing.assert_close(ps.stored(model, "0.weight").grad, twin[0].weight.grad * mask)
    assert counter.frame_count == 2  # with the probe and without


def test_frozen_compiles_and_lets_go():
    model = ps.sparsify(nn.Linear(8, 8), 0.5).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8)
    with torch.no_grad():
        with ps.frozen(model):
            torch.testing.assert_close(compiled(x), model(x))
        ps.stored(model, "weight").zero_()
        torch.testing.assert_close(compiled(x), model.bias.expand(2, 8))


def test_inductor_agrees_forward_and_backward():
    need_inductor()
    model = ps.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), 0.5)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 8)
    expected = torch.autograd.grad(model(x).pow(2).sum(), model.parameters())
    torch.testing.assert_close(compiled(x), model(x))
    found = torch.autograd.grad(compiled(x).pow(2).sum(), model.parameters())
    torch.testing.assert_close(found, expected)
    ps.sparsify(model, 0.9)
    torch.testing.assert_close(compiled(x), model(x))
