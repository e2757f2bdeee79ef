"""The sums that `fuse` makes part of convolutions: dtypes, shapes, gradients, memory."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from tests.acceleration.test_accelerate import close
from tests.acceleration.test_accelerate import pytestmark as pytestmark  # marks these tests too
from tests.acceleration.test_fuse import network


class Sum(nn.Module):
    def __init__(self, add=operator.add):
        super().__init__()
        self.layer, self.add = nn.Conv2d(8, 8, 3, padding=1), add

    def forward(self, x, added):
        return F.relu(self.add(self.layer(x), added))


DTYPES = torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.float64, torch.complex64


def outcome(call, *inputs):
    """Return the output of a call, or the error as which it ends."""
    try:
        return call(*inputs)
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("add", [operator.add, operator.iadd, torch.add])
@pytest.mark.parametrize("how", ["compiled", "bag", torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_sums_have_the_dtype_and_the_shape_of_torchs(add, how):
    dtype = how if isinstance(how, torch.dtype) else torch.float32
    model = ps.squash(ps.sparsify(Sum(add), 0.7)).eval().to(dtype)
    fused, x = ps.fuse(model), torch.randn(2, 8, 7, 7)
    if how in ("compiled", "bag"):
        ps.accelerate(fused, formats={"layer.weight": [[1, how]]})
    for added in (*(x.to(other) for other in DTYPES), x[None], x[0]):
        found, want = (outcome(m, x.to(dtype), added) for m in (fused, model))
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)
        else:
            assert found is want


class Sums(nn.Module):
    """Two convolutions, of which the first has `dtype`; the second is added in place."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 1, dtype=dtype), nn.Conv2d(8, 8, 1)

    def forward(self, x, y):
        first = self.first(x)
        first += self.last(y)
        return first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@torch.no_grad()
def test_sums_in_place_keep_the_dtype_of_what_they_change(dtype):
    model, x = Sums(dtype).eval(), torch.randn(2, 8, 7, 7)
    found = ps.fuse(model)(x.to(dtype), x)
    torch.testing.assert_close(found, model(x.to(dtype), x), rtol=2e-2, atol=2e-2)


def test_the_gradient_of_what_is_added_is_that_of_the_network():
    model = ps.squash(ps.sparsify(Sum(), 0.7)).eval().requires_grad_(False)
    fused = ps.accelerate(ps.fuse(model), formats={"layer.weight": [[1, "compiled"]]})
    x, added = torch.randn(2, 2, 8, 7, 7)
    found = [
        torch.autograd.functional.vjp(lambda t, m=m: m(x, t), added, x) for m in (fused, model)
    ]
    for got, want in zip(*found, strict=True):
        close(got, want)


@torch.no_grad()
def test_it_adds_what_torch_adds():
    model = ps.squash(ps.sparsify(Sum(), 0.7)).eval()
    fused = ps.accelerate(ps.fuse(model), formats={"layer.weight": [[1, "compiled"]]})
    x = torch.randn(2, 8, 7, 7)
    for added in (
        3,
        0.5,
        x.to_sparse(),
        x.half(),
        x > 0,
        x[0],
        x[None],
        x.sum(),
        torch._neg_view(x),
    ):
        close(fused(x, added), model(x, added))


@torch.no_grad()
def test_a_sum_of_two_convolutions_in_place_is_part_of_the_second():
    fused = ps.fuse(network("in place, two convolutions")[0])
    assert all(n.target not in (operator.add, operator.iadd) for n in fused.graph.nodes)


class Weight(nn.Module):
    """Adds the weight of one layer to the output of another."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 7)

    def forward(self, x):
        added = self.other.weight
        return F.relu(self.layer(x) + added) * self.other(x)


@pytest.mark.parametrize("format_", ["compiled", "bag", None])
@pytest.mark.parametrize("keep_dense", [True, False])
@torch.no_grad()
def test_a_weight_that_is_added(format_, keep_dense):
    model = ps.squash(ps.sparsify(Weight(), 0.7)).eval()
    plan = {"other.weight": [[1, "bag"]], "layer.weight": [[1, "bag"], [2, format_]]}
    x = torch.randn(2, 8, 7, 7)
    fused = ps.accelerate(ps.fuse(model), formats=plan, keep_dense=keep_dense)
    close(fused(x), model(x))
