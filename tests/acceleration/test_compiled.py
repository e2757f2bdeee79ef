"""The kernel that is compiled on this machine computes what the others do."""

import copy
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.acceleration.formats import library
from parasparse.acceleration.formats.compiled import Compiled
from parasparse.acceleration.formats.format import formats_of
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
    groups=st.sampled_from([1, 2]),
    batch=st.integers(1, 2),
)
@torch.no_grad()
def test_convolutions_of_all_sizes(sizes, kernel, stride, dilation, groups, batch):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
    dense = kind(6, 4, kernel, stride, dilation, dilation, groups)
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


def test_it_is_chosen_from_only_when_asked(compiler):
    dense, _, inputs = sparse("linear")
    found = [
        {row.format for row in ps.accelerated(ps.accelerate(copy.deepcopy(dense), *inputs, **how))}
        for how in ({}, {"compile_kernel": True}, {"formats": ["csr"], "compile_kernel": True})
    ]
    assert "compiled" not in found[0]
    if library.library() is None:
        assert "compiled" not in found[1] | found[2]


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_a_compiler_that_fails_is_a_warning_with_a_way_out(compiler, fresh, tmp_path):
    fresh.setenv("CXX", compiler)
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
    library.library()
    fresh.setattr(library.subprocess, "run", None)
    library.library.cache_clear()
    assert library.library() is not None
    assert len(list((tmp_path / "parasparse").iterdir())) == 1


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@torch.no_grad()
def test_it_compiles_in_one_graph_of_torch(name):
    dense, plan, inputs = sparse(name)
    plan = {weight: [[1, "compiled"]] for weight in plan}
    model = ps.accelerate(copy.deepcopy(dense), formats=plan, keep_dense=False)
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), dense(*inputs))
