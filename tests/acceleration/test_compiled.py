"""The kernel that is compiled on this machine computes what the others do."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map_only

import parasparse as ps
from parasparse.acceleration.formats import library
from parasparse.acceleration.formats.compiled import Compiled
from parasparse.acceleration.formats.format import formats_of
from parasparse.acceleration.weight import shifts
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from tests.acceleration.test_accelerate import case, close, sparse
from tests.acceleration.test_accelerate import pytestmark as pytestmark  # marks these tests too


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Let the library be sought anew in an empty folder, and again after the test."""
    with monkeypatch.context() as changes:
        changes.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        library.library.cache_clear()
        yield changes
    library.library.cache_clear()


@pytest.fixture(params=["with a compiler", "without one"])
def compiler(request):
    """With a compiler that makes the kernel, if this machine has one; and with none."""
    if request.param == "without one":
        request.getfixturevalue("fresh").setenv("CXX", "/no/such/compiler")
        with pytest.warns(UserWarning, match=r'"compiled" could not be compiled'):
            library.library()


@case
@torch.no_grad()
def test_outputs_are_those_of_the_dense_model(name, compiler):
    dense, plan, inputs = sparse(name)
    if name == "float64":
        pytest.skip("the kernel is for float32")
    plan = {weight: [[1, "compiled"]] for weight in plan}
    model = ps.accelerate(copy.deepcopy(dense), formats=plan)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(one(*inputs), dense(*inputs))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3, 6]),
    batch=st.integers(1, 2),
)
@torch.no_grad()
def test_convolutions_of_all_sizes(sizes, kernel, stride, dilation, groups, batch):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
    dense = kind(6, 12, kernel, stride, dilation, dilation, groups)
    dense.weight.mul_(torch.rand_like(dense.weight) < 0.4)
    x = torch.randn(batch, 6, *(size + 2 for size in sizes))
    want = dense(x)
    if 2 * dense.weight.count_nonzero() <= dense.weight.numel():
        ps.accelerate(dense, formats={"weight": [[1, "compiled"]]})
    close(dense(x), want)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 48, 49, 100])
def test_any_number_of_threads_gives_the_same(n):
    weight = torch.randn(40, 50) * (torch.rand(40, 50) < 0.2)
    made, x, before = Compiled.of(weight), torch.randn(n, 50), torch.get_num_threads()
    want = made.rows(x, None)
    torch.testing.assert_close(want, x @ weight.T, rtol=1e-4, atol=1e-4)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(made.rows(x, None), want)
            assert torch.equal(made.rows(x.T.contiguous().T, None), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("groups", [1, 2, 40])
@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_convolutions_are_the_same_for_any_number_of_threads(groups, batch):
    weight = torch.randn(80, 40 // groups, 3, 3)
    weight *= torch.rand_like(weight) < 0.2
    x, before = torch.randn(batch, 40, 9, 10), torch.get_num_threads()
    fast, more = SparseWeight(weight, ((1, "compiled"),)), (None, 2, 1, 1, groups)
    want = F.conv2d(x, fast, *more)
    close(want, F.conv2d(x, weight, *more))
    try:
        torch.set_num_threads(3)
        assert torch.equal(F.conv2d(x, fast, *more), want)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_the_default_device_does_not_matter():
    x, weight = torch.randn(2, 40, 7, 6), torch.randn(8, 40, 3, 3)
    weight *= torch.rand_like(weight) < 0.2
    steps = shifts.Steps((3, 3), (2, 2), (1, 1), (1, 1))
    shifts._windows.cache_clear()
    with torch.device("meta"):
        fast = copy.deepcopy(SparseWeight(weight, ((1, "compiled"),), keep_dense=False))
        assert all(t.is_cpu for t in shifts._windows(tuple(x.shape), steps)[2])
        close(F.conv2d(x, fast, None, 2, 1), F.conv2d(x, weight, None, 2, 1))


def test_it_shares_the_tensors_of_csr():
    made = formats_of(torch.eye(64), ["csr", "compiled"])
    both = zip(made["csr"].tensors(), made["compiled"].tensors(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in both)


def test_other_dtypes_are_torchs_own_error():
    made = Compiled.of(torch.eye(8))
    for call in (
        lambda: made.rows(torch.ones(2, 8).double(), None),
        lambda: made.columns(torch.ones(8, 2).double()),
    ):
        with pytest.raises(RuntimeError):
            call()


class Wrapped(torch.Tensor):
    """A tensor whose values are another tensor's, as those of a DTensor are."""

    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.values_ = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda t: t.values_, (args, kwargs or {}))
        return func(*args, **kwargs)


VIEWS = {
    "as it is": lambda t: t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one value": lambda t: t[..., :1].expand(t.shape),
    "negated": lambda t: torch._neg_view(t),
    "a subclass": Wrapped,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv1d(6, 8, 3), nn.Conv1d(6, 8, 1)])
@torch.no_grad()
def test_inputs_and_biases_of_any_memory(layer, view):
    call = F.linear if isinstance(layer, nn.Linear) else F.conv1d
    dense = layer.weight * (torch.rand_like(layer.weight) < 0.3)
    fast = SparseWeight(dense, ((1, "compiled"),))
    x, bias = torch.randn(4, 6, 6), torch.randn(8)
    close(call(view(x), fast, bias), call(view(x), dense, bias))
    close(call(x, fast, view(bias)), call(x, dense, view(bias)))


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv1d(6, 8, 3), nn.Conv1d(6, 8, 1)])
@torch.no_grad()
def test_a_bias_of_another_length_is_torchs_own_error(layer):
    call = F.linear if isinstance(layer, nn.Linear) else F.conv1d
    dense = layer.weight * (torch.rand_like(layer.weight) < 0.3)
    for weight in (dense, SparseWeight(dense, ((1, "compiled"),))):
        for length in (5, 9):
            with pytest.raises(RuntimeError):
                call(torch.randn(4, 6, 6), weight, torch.randn(length))


def test_it_is_chosen_from_only_when_asked(compiler):
    dense, _, inputs = sparse("linear")
    found = [
        {row.format for row in ps.accelerated(ps.accelerate(copy.deepcopy(dense), *inputs, **how))}
        for how in ({}, {"compile_kernel": True}, {"formats": ["csr"], "compile_kernel": True})
    ]
    assert "compiled" not in found[0]
    if library.library() is None:
        assert "compiled" not in found[1] | found[2]


WITHOUT = {
    "no compiler": {"CXX": "/no/such/compiler"},
    "one that fails": {"CXX": "false"},
    "a quotation mark that is not closed": {"CXX": "c++ '"},
    "a folder that cannot be made": {"TORCH_EXTENSIONS_DIR": __file__},
    "no home": {"TORCH_EXTENSIONS_DIR": "~no such user/folder"},
}


@pytest.mark.parametrize("variables", WITHOUT.values(), ids=WITHOUT)
def test_a_compiler_that_fails_is_a_warning_with_a_way_out(variables, fresh, tmp_path):
    for name, value in variables.items():
        fresh.setenv(name, value)
    dense, _, inputs = sparse("linear")
    with pytest.warns(UserWarning, match="Install a C"), torch.no_grad():
        close(
            ps.accelerate(copy.deepcopy(dense), *inputs, compile_kernel=True)(*inputs),
            dense(*inputs),
        )
    assert library.library() is None  # said once
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_it_compiles_once(fresh, tmp_path):
    (tmp_path / "my compiler").symlink_to(shutil.which("c++"))
    fresh.setenv("CXX", f"'{tmp_path}/my compiler' -g")
    fresh.setenv("TORCH_EXTENSIONS_DIR", f"{tmp_path}/my folder")
    library.library()
    fresh.setattr(library.subprocess, "run", None)
    library.library.cache_clear()
    assert library.library() is not None
    assert len(list((tmp_path / "my folder" / "parasparse").iterdir())) == 1


def test_empty_variables_are_none(fresh):
    for name in ("CXX", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        fresh.setenv(name, "")
    fresh.setattr(library, "_built", lambda compiler: compiler)
    assert library.library() == ["c++"]
    assert library._folder() == Path.home() / ".cache/torch_extensions/parasparse"


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@torch.no_grad()
def test_it_compiles_in_one_graph_of_torch(name):
    dense, plan, inputs = sparse(name)
    plan = {weight: [[1, "compiled"]] for weight in plan}
    model = ps.accelerate(copy.deepcopy(dense), formats=plan, keep_dense=False)
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), dense(*inputs))
