"""A fused network computes what the network does, dense and accelerated."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from tests.acceleration.test_accelerate import close
from tests.acceleration.test_accelerate import pytestmark as pytestmark  # marks these tests too

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Block(nn.Module):
    """A residual block, whose sum and activation are computed by functions."""

    def __init__(self, ends, dims=2, bias=True, **how):
        super().__init__()
        self.ends = ends
        how = {"padding": 1} | how
        self.first = CONVOLUTIONS[dims](8, 8, 3, bias=bias, **how)
        self.norm = NORMS[dims](8)
        self.relu = nn.ReLU(inplace=True)
        self.last = CONVOLUTIONS[dims](8, 8, 3, bias=bias, padding=1)

    def forward(self, x):
        return self.ends(self, x, self.last(self.relu(self.norm(self.first(x)))))


def in_place(_, x, y):
    y += x
    return y.relu_()


def of_the_sum_twice(_, x, y):
    total = x + y
    return F.relu(total) * total


def with_what_changed(_, x, y):
    x = x * 2
    y = y + x
    return torch.relu(y) + x


NETWORKS = {
    "sum and ReLU": Block(lambda b, x, y: b.relu(x + y)),
    "in place": Block(in_place),
    "torch.add": Block(lambda _, x, y: F.relu(torch.add(y, x), inplace=True)),
    "a multiple": Block(lambda _, x, y: F.relu(torch.add(y, x, alpha=2))),
    "a sum alone": Block(lambda _, x, y: y + x),
    "a number": Block(lambda _, x, y: (y + 1).relu()),
    "twice itself": Block(lambda _, x, y: (y + y).relu()),
    "the sum twice": Block(of_the_sum_twice),
    "what has changed": Block(with_what_changed),
    "another shape": Block(lambda _, x, y: F.relu(y + x.mean((2, 3), keepdim=True))),
    "a larger shape": Block(lambda _, x, y: F.relu(y.mean((2, 3), keepdim=True) + x)),
    "another class": Block(lambda _, x, y: F.relu(y + x.double())),
    "another memory": Block(lambda _, x, y: F.relu(y + x.transpose(2, 3))),
    "other activation": Block(lambda _, x, y: F.gelu(y + x)),
    "two convolutions": Block(lambda b, x, y: b.relu(y + b.last(x))),
    "no bias": Block(lambda b, x, y: b.relu(y + x), bias=False),
    "1-d": Block(lambda b, x, y: b.relu(y + x), dims=1),
    "3-d": Block(lambda b, x, y: b.relu(y + x), dims=3),
    "groups, dilation, stride": Block(lambda b, _, y: b.relu(y), groups=2, dilation=2, stride=2),
    "same": Block(lambda b, x, y: b.relu(y + x), padding="same"),
    "circular": Block(lambda b, x, y: b.relu(y + x), padding_mode="circular"),
    "pooling": nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
}
case = pytest.mark.parametrize("name", NETWORKS)


def network(name):
    """Return a sparse network with norms that have seen data, and an input."""
    torch.manual_seed(0)
    model = copy.deepcopy(NETWORKS[name])
    dims = next(p.ndim for p in model.parameters()) - 2
    x = torch.randn(2, 8, *[7, 7, 7][:dims])
    model(x)
    ps.squash(ps.sparsify(model, 0.7))
    return model.eval(), x


def convolutions(model):
    return [n for n, t in model.named_parameters() if t.ndim > 2]


@case
@torch.no_grad()
def test_outputs_are_those_of_the_network(name):
    model, x = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = ps.fuse(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(isinstance(m, tuple(NORMS.values())) for m in _used(fused))
    for one in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        close(one(x), model(x))


@case
@pytest.mark.parametrize("format_", ["compiled", "bag"])
@torch.no_grad()
def test_outputs_are_those_of_the_network_accelerated(name, format_):
    model, x = network(name)
    fused = ps.fuse(model)
    plan = {key: [[1, format_]] for key in convolutions(fused)}
    fast = ps.accelerate(copy.deepcopy(fused), formats=plan)
    for one in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(one(x), model(x))
    if x.ndim == 4:
        other = torch.randn(3, 8, 12, 12)
        close(fast(other), model(other))
        last = other.contiguous(memory_format=torch.channels_last)
        close(fast(last), model(last))
    close(ps.restore(fast)(x), fused(x))


@torch.no_grad()
def test_it_is_one_call():
    fused = ps.fuse(network("sum and ReLU")[0])
    assert len([n for n in fused.graph.nodes if n.op.startswith("call")]) == 2
    assert all(n.target is not operator.add for n in fused.graph.nodes)


@pytest.mark.parametrize("name", ["sum and ReLU", "pooling"])
@torch.no_grad()
def test_it_compiles_in_one_graph(name):
    model, x = network(name)
    fused = ps.fuse(model)
    ps.accelerate(fused, formats={key: [[1, "compiled"]] for key in convolutions(fused)})
    close(torch.compile(fused, backend="aot_eager", fullgraph=True)(x), model(x))


@torch.no_grad()
def test_under_autocast_dtypes_are_those_of_the_network():
    model, x = network("sum and ReLU")
    fused = ps.fuse(model)
    ps.accelerate(fused, formats={key: [[1, "compiled"]] for key in convolutions(fused)})
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == model(x).dtype
        assert fused(x.bfloat16()).dtype == model(x.bfloat16()).dtype


@torch.no_grad()
def test_not_a_number_passes_and_inputs_stay():
    model, x = network("sum and ReLU")
    x[0, 0, 0, 0] = torch.nan
    fused, before = ps.fuse(model), x.clone()
    ps.accelerate(fused, formats={key: [[1, "compiled"]] for key in convolutions(fused)})
    assert fused(x)[0, 0, 0, 0].isnan()
    assert not fused(x)[1].isnan().any()
    torch.testing.assert_close(x, before, equal_nan=True)


@torch.no_grad()
def test_modules_with_hooks_are_called():
    model, x = network("sum and ReLU")
    calls = []
    model.last.register_forward_hook(lambda *_: calls.append(1))
    close(ps.fuse(model)(x), model(x))
    assert len(calls) == 2


@torch.no_grad()
def test_accelerate_measures_a_fused_network():
    model, x = network("sum and ReLU")
    fused = ps.accelerate(ps.fuse(model), x, compile_kernel=True)
    assert {row.name for row in ps.accelerated(fused)} == {"first.weight", "last.weight"}
    close(fused(x), model(x))


def test_it_is_for_inference_and_comes_first():
    model, _ = network("sum and ReLU")
    with pytest.raises(RuntimeError, match="eval"):
        ps.fuse(model.train())
    ps.accelerate(model.eval(), formats={"last.weight": [[1, "bag"]]})
    with pytest.raises(RuntimeError, match="before `accelerate`"):
        ps.fuse(model)


def _used(fused):
    return [fused.get_submodule(n.target) for n in fused.graph.nodes if n.op == "call_module"]
