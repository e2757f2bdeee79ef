"""Convolutions with a sparse weight agree with torch's, strip by strip."""

import copy
import gc
import io
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.acceleration.formats.compressed import Bag
from parasparse.acceleration.installing import weights_in
from parasparse.acceleration.weight import convolution
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl

CALLS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def convolutions(draw):
    """Return an input, a weight, a bias and the arguments of a convolution."""

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    channels = groups * draw(st.integers(1, 3))
    outputs = groups * draw(st.integers(1, 4))
    kernel, dilation = each(1, 3), each(1, 2)
    more = {"stride": each(1, 3), "padding": each(0, 2), "dilation": dilation, "groups": groups}
    if draw(st.booleans()):
        more |= {"stride": 1, "padding": draw(st.sampled_from(["same", "valid"]))}
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [low + more for low, more in zip(least, each(0, 6), strict=True)]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randn(draw(st.integers(1, 3)), channels, *sizes, dtype=dtype)
    if draw(st.booleans()):
        x = x[0]
    weight = torch.randn(outputs, channels // groups, *kernel, dtype=dtype)
    weight *= torch.rand_like(weight) < 0.3
    bias = torch.randn(outputs, dtype=dtype) if draw(st.booleans()) else None
    return CALLS[dims], x, weight, bias, more


@given(convolutions(), st.sampled_from([1, 5, 512]), st.sampled_from(["csr", "bag"]))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_sparse_convolution_is_the_dense_one(case, strip, name):
    call, x, weight, bias, more = case
    sparse = SparseWeight(weight, ((1, name),))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_STRIP", strip)
        got, want = call(x, sparse, bias, **more), call(x, weight, bias, **more)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 100))
def test_strips_cover_all_once_and_are_small(sizes, most):
    found = torch.zeros(sizes)
    for strip in convolution._strips(tuple(sizes), most):
        assert found[strip].numel() <= most
        found[strip] += 1
    assert bool(found.eq(1).all())


@pytest.fixture(scope="module")
def network():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=2),
        nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    ).eval()  # fmt: skip
    return ps.squash(ps.sparsify(model, 0.8))


def accelerated(network, format_="bag", **more):
    plan = {name: [[1, format_]] for name, p in network.named_parameters() if p.ndim > 1}
    return ps.accelerate(copy.deepcopy(network), formats=plan, **more)


INPUTS = {
    "one image": lambda: torch.randn(1, 8, 9, 7),
    "large": lambda: torch.randn(1, 8, 40, 33),
    "batch": lambda: torch.randn(5, 8, 24, 24),
    "unbatched": lambda: torch.randn(8, 9, 7),
    "channels last": lambda: torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 8, 9, 7).transpose(2, 3),
    "every other": lambda: torch.randn(4, 16, 18, 14)[::2, ::2, ::2, ::2],
    "expanded": lambda: torch.randn(1, 8, 1, 7).expand(3, 8, 9, 7),
    "empty": lambda: torch.randn(0, 8, 9, 7),
}


each_format = pytest.mark.parametrize("format_", ["bag", "compiled"])


@each_format
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_any_size_and_layout(network, name, format_):
    x = INPUTS[name]()
    for keep_dense in (True, False):
        model = accelerated(network, format_, keep_dense=keep_dense)
        with torch.inference_mode():
            got, want = model(x), network(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.stride() == want.stride()


@each_format
def test_copies_files_and_threads(network, format_):
    x = torch.randn(2, 8, 24, 24)
    model, file = accelerated(network, format_), io.BytesIO()
    with torch.no_grad():
        want = network(x)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        torch.save(model, file)
        file.seek(0)
        for made in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(torch.inference_mode()(lambda _: model(x)), range(8)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@each_format
def test_nothing_is_kept_alive(network, format_):
    model = accelerated(network, format_)
    with torch.no_grad():
        model(torch.randn(2, 8, 9, 7))
    every = [w for _, w in weights_in(model)]
    formats = [f for w in every for f in w._formats.values()]
    tensors = [t for f in formats for t in f.tensors()]
    kept = [weakref.ref(each) for each in (*every, *formats, *tensors)]
    del every, formats, tensors
    ps.restore(model)
    gc.collect()
    assert not [ref() for ref in kept if ref() is not None]


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((1, 8, 2, 2), {}),
        ((1, 6, 5, 5), {}),
        ((1, 8, 5, 5), {"stride": 2, "padding": "same"}),
        ((1, 8, 5, 5), {"padding": -1}),
        ((1, 8, 5, 5), {"stride": 0}),
        ((1, 8, 5, 5), {"dilation": 0}),
        ((1, 12, 5, 5), {"groups": 2}),
        ((1, 8, 5, 5), {"groups": 0}),
        ((8, 5), {}),
    ],
    ids=str,
)
def test_what_torch_refuses_is_refused(shape, more):
    x, weight = torch.randn(shape), torch.eye(8).view(8, 8, 1, 1).repeat(1, 1, 3, 3)
    for made in (weight, SparseWeight(weight, ((1, "csr"),))):
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            F.conv2d(x, made, **more)


def test_patches_are_a_view_and_strips_stay_small(network):
    """The patches of a whole image would be nine times its bytes."""
    x = torch.randn(1, 8, 200, 200)
    seen = []

    def columns(matrix, u):
        seen.append(u.shape[1])
        return multiply(matrix, u)

    multiply = Bag.columns
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bag, "columns", columns)
        accelerated(network)[0](x)
    assert sum(seen) == 200 * 200
    assert max(seen) <= convolution._STRIP
    assert len(seen) <= math.ceil(200 / (convolution._STRIP // 200))


def test_a_compiled_convolution_is_one_operator_however_many_strips(network):
    x, found = torch.randn(3, 8, 9, 10), []

    def backend(graph, _):
        found.extend(n for n in graph.graph.nodes if n.target is convolution._operator._opoverload)
        return graph

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(convolution, "_STRIP", 5)
        compiled = torch.compile(accelerated(network), backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
    assert len(found) == 4
