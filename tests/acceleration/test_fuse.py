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


def of_another_name(_, x, y):
    other = y
    other += x
    return y.relu()


def of_two_convolutions(block, x, y):
    y += block.last(x)
    return block.relu(y)


def into_the_input(_, x, y):
    x = total = x * 2
    total += y
    return x - y


def of_an_output_that_is_read_later(b, x, y):
    first = b.last(x)
    return F.relu(b.last(y) + first) * first


def of_an_output_twice(b, x, y):
    first = b.last(x)
    return F.relu(b.last(y) + first) + F.relu(b.last(x) + first)


def of_its_own_input(b, x, y):
    first = b.last(x)
    return F.relu(b.last(first) + first)


class Number(Block):
    """A block that adds a number which depends on the size of its input."""

    def forward(self, x):
        number = x.size(1)
        return F.relu(self.last(self.norm(self.first(x))) + number)


NETWORKS = {
    "sum and ReLU": Block(lambda b, x, y: b.relu(x + y)),
    "in place": Block(in_place),
    "in place, another name": Block(of_another_name),
    "in place, into the input": Block(into_the_input),
    "in place, two convolutions": Block(of_two_convolutions),
    "torch.add": Block(lambda _, x, y: F.relu(torch.add(y, x), inplace=True)),
    "a multiple": Block(lambda _, x, y: F.relu(torch.add(y, x, alpha=2))),
    "a sum alone": Block(lambda _, x, y: y + x),
    "a number": Block(lambda _, x, y: (y + 1).relu()),
    "a size": Number(None),
    "twice itself": Block(lambda _, x, y: (y + y).relu()),
    "the sum twice": Block(of_the_sum_twice),
    "what has changed": Block(with_what_changed),
    "another shape": Block(lambda _, x, y: F.relu(y + x.mean((2, 3), keepdim=True))),
    "a larger shape": Block(lambda _, x, y: F.relu(y.mean((2, 3), keepdim=True) + x)),
    "another class": Block(lambda _, x, y: F.relu(y + x.double())),
    "another memory": Block(lambda _, x, y: F.relu(y + x.transpose(2, 3))),
    "other activation": Block(lambda _, x, y: F.gelu(y + x)),
    "two convolutions": Block(lambda b, x, y: b.relu(y + b.last(x))),
    "an output that is read later": Block(of_an_output_that_is_read_later),
    "an output twice": Block(of_an_output_twice),
    "its own input": Block(of_its_own_input),
    "ReLU6": Block(lambda _, x, y: F.relu6(y + x)),
    "Hardsigmoid": Block(lambda _, x, y: F.hardsigmoid(y + x, inplace=True)),
    "Hardswish": Block(lambda _, x, y: F.hardswish(4 * x) + F.hardswish(y)),
    "modules": nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.ReLU6()),
    "no bias": Block(lambda b, x, y: b.relu(y + x), bias=False),
    "1-d": Block(lambda b, x, y: b.relu(y + x), dims=1),
    "3-d": Block(lambda b, x, y: b.relu(y + x), dims=3),
    "depthwise": Block(lambda b, _, y: b.relu(y), groups=8),
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
    assert not any(isinstance(m, tuple(NORMS.values())) for m in fused.modules())
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


def with_a_hook(layer, kind="forward"):
    """Return `layer`, which doubles its inputs or its outputs."""
    if kind == "forward":
        layer.register_forward_hook(lambda _, inputs, output: 2 * output)
    else:
        layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    return layer


class Rows(nn.Module):
    """A linear layer whose norm takes the second of three dimensions for channels."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(7, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.linear(x[:, :, 0]))


def lost_statistics():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    norm.track_running_stats = True
    return norm


CONV, NORM = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
ON_THEIR_OWN = {
    "one convolution, two norms": nn.Sequential(CONV, NORM, nn.ReLU(), CONV, nn.BatchNorm2d(8)),
    "one convolution, one norm": nn.Sequential(CONV, NORM, CONV, NORM),
    "one norm": nn.Sequential(CONV, NORM, nn.ReLU(), nn.Conv2d(8, 8, 3), NORM),
    "once without a norm": Block(lambda b, x, y: b.first(x) + y),
    "a weight that is read": Block(lambda b, x, y: F.conv2d(x, b.first.weight, padding=1) + y),
    "hook of a convolution": nn.Sequential(with_a_hook(nn.Conv2d(8, 8, 3)), NORM),
    "earlier hook": nn.Sequential(with_a_hook(nn.Conv2d(8, 8, 3), "pre"), NORM),
    "hook of a norm": nn.Sequential(nn.Conv2d(8, 8, 3), with_a_hook(nn.BatchNorm2d(8))),
    "hook of a container": nn.Sequential(with_a_hook(nn.Sequential(CONV, NORM))),
    "no statistics": nn.Sequential(CONV, nn.BatchNorm2d(8, track_running_stats=False)),
    "lost statistics": nn.Sequential(CONV, lost_statistics()),
    "linear": Rows(),
}


@pytest.mark.parametrize("name", ON_THEIR_OWN)
@torch.no_grad()
def test_norms_stay_where_they_cannot_be_folded(name):
    torch.manual_seed(0)
    model, x = copy.deepcopy(ON_THEIR_OWN[name]), torch.randn(2, 8, 7, 7)
    model(x)
    fused = ps.fuse(ps.squash(ps.sparsify(model, 0.7)).eval())
    close(fused(x), model(x))
    plan = {key: [[1, "bag"]] for key, t in fused.named_parameters() if t.ndim > 1}
    close(ps.accelerate(fused, formats=plan)(x), model(x))


@torch.no_grad()
def test_weights_computed_by_hooks_stay():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    x = torch.randn(2, 8, 7, 7)
    close(ps.fuse(model)(x), model(x))


@torch.no_grad()
def test_a_norm_in_training_mode_stays():
    model, x = network("sum and ReLU")
    model.norm.train()
    close(ps.fuse(model)(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_of_the_model_itself_are_refused(kind):
    model, x = network("sum and ReLU")
    with pytest.raises(RuntimeError, match=r"nn\.Sequential\(model\)\.eval\(\)"):
        ps.fuse(with_a_hook(model, kind))
    close(ps.fuse(nn.Sequential(model).eval())(x), model(x))


class SetsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.layer(x)
        y.data += 1.0
        return y


def test_a_tensor_whose_data_is_set_is_refused():
    with pytest.raises(RuntimeError, match=r"must not set `\.data`"):
        ps.fuse(SetsData().eval())


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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch deprecates `jit.trace`
@torch.no_grad()
def test_a_traced_or_exported_graph_is_for_batches_of_any_size():
    model, x = network("pooling")
    fused, other = ps.fuse(model).requires_grad_(False), torch.randn(5, 8, 7, 7)
    close(torch.jit.trace(fused, x)(other), model(other))
    exported = torch.export.export(fused, (x,), dynamic_shapes=[{0: torch.export.Dim("batch")}])
    close(exported.module()(other), model(other))


@pytest.mark.parametrize("name", ["sum and ReLU", "pooling"])
@torch.no_grad()
def test_vmap_goes_through(name):
    model, x = network(name)
    close(torch.func.vmap(ps.fuse(model))(x[None]), model(x)[None])


@torch.no_grad()
def test_under_autocast_dtypes_are_those_of_the_network():
    model, x = network("sum and ReLU")
    fused = ps.fuse(model)
    ps.accelerate(fused, formats={key: [[1, "compiled"]] for key in convolutions(fused)})
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == model(x).dtype
        assert fused(x.bfloat16()).dtype == model(x.bfloat16()).dtype


@torch.no_grad()
def test_pooling_takes_what_torchs_does():
    pool, x = nn.MaxPool2d(2).eval(), torch.randn(2, 3, 8, 8)
    fused = ps.fuse(nn.Sequential(pool).eval())
    assert torch.equal(fused(x.to_mkldnn()).to_dense(), pool(x))
    for view in (x[0], x.bfloat16(), x.double(), (9 * x).int(), x[:0], x[..., ::2], x.mT):
        assert torch.equal(fused(view), pool(view))
        assert fused(view).stride() == pool(view).stride()


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
