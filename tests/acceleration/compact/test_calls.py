"""A compact weight in every form of call that torch allows, beside the masked weight."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import parasparse as ps
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl


def r(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CALLS = {
    "addmm": lambda w: torch.addmm(r(6), r(3, 5), w),
    "addmm by name": lambda w: torch.addmm(input=r(6), mat1=r(3, 5), mat2=w),
    "addmm, scaled": lambda w: torch.addmm(r(6), r(3, 5), w, beta=2, alpha=3),
    "addmm, bias of rows": lambda w: torch.addmm(r(3, 1), r(3, 5), w),
    "mm by name": lambda w: torch.mm(input=r(3, 5), mat2=w),
    "matmul by name": lambda w: torch.matmul(r(3, 5), other=w),
    "matmul of three dimensions": lambda w: torch.matmul(r(2, 3, 5), w),
    "linear by name": lambda w: F.linear(weight=w, input=r(3, 6)),
    "linear of sparse rows": lambda w: F.linear(torch.eye(6).double().to_sparse(), w),
    "linear of CSR rows": lambda w: F.linear(torch.eye(6).double().to_sparse_csr(), w),
    "sparse @ w": lambda w: torch.eye(5).double().to_sparse() @ w,
    "tensordot": lambda w: torch.tensordot(r(3, 6), w, ([1], [1])),
    "einsum": lambda w: torch.einsum("bi,oi->bo", r(3, 6), w),
    "norm": torch.norm,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_form_of_a_call_gives_the_values_and_gradients_of_the_masked_weight(call):
    masked = ps.sparsify(nn.Linear(6, 5).double(), 0.6)
    small = ps.compact(copy.deepcopy(masked))
    for model in (masked, small):
        call(model.weight).square().sum().backward()
    torch.testing.assert_close(call(small.weight), call(masked.weight))
    ps.expand(small)
    want, got = (m.parametrizations.weight.original.grad for m in (masked, small))
    torch.testing.assert_close(got, want)


REFUSED = {
    "bias of more rows": lambda w: torch.addmm(r(3, 6), r(1, 5), w),
    "addmm of three dimensions": lambda w: torch.addmm(r(6), r(2, 3, 5), w),
    "mm of three dimensions": lambda w: torch.mm(r(2, 3, 5), w),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(call):
    masked = ps.sparsify(nn.Linear(6, 5).double(), 0.6)
    for model in (masked, ps.compact(copy.deepcopy(masked))):
        with pytest.raises(RuntimeError):
            call(model.weight)


def test_addmm_has_the_dtype_of_autocast():
    layer = ps.compact(ps.sparsify(nn.Linear(6, 5), 0.6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.addmm(torch.ones(6), torch.ones(3, 5), layer.weight).dtype == torch.bfloat16


def test_a_result_may_be_written_to_another_tensor():
    layer = ps.compact(ps.sparsify(nn.Linear(6, 5), 0.6))
    with torch.no_grad():
        out = torch.empty(5, 6)
        torch.add(layer.weight, 1, out=out)
        assert torch.equal(out, layer.weight + 1)
        with pytest.raises(RuntimeError, match="must not be changed in place"):
            torch.add(out, 1, out=layer.weight)


WRITING = {
    "copy": lambda w: r(5, 6).copy_(w),
    "add": lambda w: r(5, 6).add_(w, alpha=2),
    "+=": lambda w: operator.iadd(r(5, 6), w),
    "addmm": lambda w: r(3, 6).addmm_(r(3, 5), w),
    "lerp": lambda w: r(5, 6).lerp_(w, 0.5),
    "part": lambda w: r(2, 5, 6)[0].copy_(w),
    "foreach": lambda w: torch._foreach_add([r(5, 6)], [w])[0],
}


@pytest.mark.parametrize("call", WRITING.values(), ids=WRITING)
def test_other_tensors_are_changed_by_a_weight(call):
    masked = ps.sparsify(nn.Linear(6, 5).double(), 0.6)
    small = ps.compact(copy.deepcopy(masked))
    torch.testing.assert_close(call(small.weight), call(masked.weight))


CHANGING = {
    "fill": lambda w: w.fill_(1.0),
    "+=": lambda w: operator.iadd(w, 1),
    "item": lambda w: operator.setitem(w, 0, 1.0),
    "data": lambda w: setattr(w, "data", r(5, 6)),
    "init": nn.init.ones_,
    "init by name": lambda w: nn.init.normal_(tensor=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
}


@pytest.mark.parametrize("call", CHANGING.values(), ids=CHANGING)
def test_the_weight_itself_is_not_changed(call):
    small = ps.compact(ps.sparsify(nn.Linear(6, 5).double(), 0.6))
    with torch.no_grad(), pytest.raises(RuntimeError, match="must not be changed in place"):
        call(small.weight)


@torch.enable_grad()
def stepped(model, optimizer):
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step(lambda: model(torch.ones(1, 6)).sum())
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda m: stepped(m, torch.optim.LBFGS(m.parameters())),
        lambda m: torch.optim.Adafactor(m.parameters()),
        lambda m: stepped(m, torch.optim.Adafactor(m.parameters())),
        lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]),
    ],
)
def test_optimizers_whose_state_cannot_be_cut_are_refused(make):
    model = ps.sparsify(nn.Linear(6, 5), 0.6)
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs an optimizer of newer versions of torch")
    optimizer = make(model)
    before = model.state_dict().keys()
    with pytest.raises(TypeError, match="build a new one|new optimizer"):
        ps.compact(model, optimizer=optimizer)
    assert model.state_dict().keys() == before


def test_adafactor_is_refused_by_expand():
    model = ps.compact(ps.sparsify(nn.Linear(6, 5), 0.6))
    optimizer = stepped(model, torch.optim.Adafactor(model.parameters()))
    with pytest.raises(TypeError, match="build a new one"):
        ps.expand(model, optimizer=optimizer)
    assert ps.named_masks(model)


@pytest.mark.parametrize("when", ["compact", "load", "forward"])
@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(8, 2), lambda: nn.GRU(8, 4)])
def test_training_goes_on_after_inference_mode(make, when):
    model = ps.sparsify(make(), 0.5)
    state = ps.compact(ps.sparsify(make(), 0.7)).state_dict()
    args = (torch.ones(3, 2, 8),) * (3 if isinstance(model, nn.MultiheadAttention) else 1)
    inside = {
        "compact": lambda: ps.compact(model),
        "load": lambda: ps.compact(model).load_state_dict(state),
        "forward": lambda: model(*(arg + i for i, arg in enumerate(args))),
    }
    if when != "compact":
        ps.compact(model)
    with torch.inference_mode():
        inside[when]()
    # Attention reads the parts of its weight only if query, key and value differ.
    model(*(arg + i for i, arg in enumerate(args)))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_inputs_of_another_dtype_are_refused_as_for_dense_weights(dtype):
    layer = ps.compact(ps.sparsify(nn.Linear(6, 6), 0.6))
    with pytest.raises(RuntimeError):
        layer(torch.ones(3, 6, dtype=dtype))
    with pytest.raises(RuntimeError):
        torch.ones(3, 6, dtype=dtype) @ layer.weight


def test_hooks_on_the_weight_name_the_stored_values():
    layer = ps.compact(ps.sparsify(nn.Linear(6, 6), 0.6))
    for call in (lambda: layer.weight.register_hook(print), lambda: layer.weight.retain_grad()):
        with pytest.raises(RuntimeError, match="original"):
            call()


def jagged():
    return torch.nested.nested_tensor([r(3, 6), r(4, 6)], layout=torch.jagged)


BYPASSING = {
    "linear": lambda w: F.linear(jagged(), w),
    "linear of a part": lambda w: F.linear(jagged(), w.chunk(2)[1]),
    "matmul": lambda w: jagged() @ w,
}


@pytest.mark.parametrize("call", BYPASSING.values(), ids=BYPASSING)
def test_tensors_that_do_not_ask_the_weight_are_refused(call):
    small = ps.compact(ps.sparsify(nn.Linear(6, 6).double(), 0.6))
    with pytest.raises(RuntimeError, match=r"compact weight.*`values\(\)`"):
        call(small.weight)


def test_jagged_inputs_pass_as_their_values_or_compiled():
    masked = ps.sparsify(nn.Linear(6, 5).double(), 0.6)
    small, given = ps.compact(copy.deepcopy(masked)), jagged()
    want = masked(given).values()
    torch.testing.assert_close(small(given.values()), want)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(given).values(), want)
