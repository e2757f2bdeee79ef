"""A weight that multiplies sparsely follows what happens to its values, masks and flags."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import parasparse as ps
from parasparse.acceleration.installing import weights_in
from tests.acceleration.test_accelerate import CASES, case, close, q, sparse, x
from tests.acceleration.test_accelerate import pytestmark as pytestmark  # marks these tests too
from tests.helpers.machine import need_bfloat16_lstm


@case
def test_other_dtypes_and_new_values_are_followed(name):
    dense, plan, inputs = sparse(name)
    if inputs[0].dtype != torch.float32:
        pytest.skip("tokens and float64 have no other dtype to go to")
    other = ps.squash(ps.sparsify(CASES[name][0]().eval(), 0.7))
    for model in (copy.deepcopy(dense), ps.sparsify(copy.deepcopy(dense), "zeros")):
        ps.accelerate(model, formats={n: [[1, "csr"]] for n in plan})
        with torch.no_grad():
            wide = torch.utils._pytree.tree_map(torch.Tensor.double, inputs)
            close(model.double()(*wide), copy.deepcopy(dense).double()(*wide))
            model.float()
            if not ps.is_sparse(model):
                model.load_state_dict(other.state_dict())
                close(model(*inputs), other(*inputs))
        ps.restore(model)


def test_a_masked_model_follows_what_is_loaded():
    model = ps.sparsify(nn.Linear(32, 48), 0.8)
    other = ps.sparsify(nn.Linear(32, 48), 0.7)
    ps.accelerate(model, formats={"weight": [[1, "csr"]]})
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
        close(model(q), other(q))
        assert model.weight is model.weight
    ps.restore(model)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(ps.mask_of(model, "weight"), ps.mask_of(other, "weight"))


def test_gradients_are_an_error():
    model, plan, inputs = sparse("linear")
    ps.accelerate(model, formats=plan)
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        model(*inputs)
    model.requires_grad_(False)
    model(*inputs)  # nothing would get one
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        model(inputs[0].clone().requires_grad_())
    ps.restore(model)
    assert not model.weight.requires_grad
    masked = ps.accelerate(ps.sparsify(nn.Linear(32, 48), 0.8), formats={"weight": [[1, "csr"]]})
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        masked(inputs[0].detach())


def test_half_is_refused_on_a_cpu_before_and_after():
    model, plan, _ = sparse("linear")
    with pytest.raises(TypeError, match=r'float32 or float64; "weight" are torch\.bfloat16'):
        ps.accelerate(copy.deepcopy(model).bfloat16())
    ps.accelerate(model, formats=plan)
    with pytest.raises(TypeError, match=r"got torch\.float16. Call parasparse\.restore"):
        model.half()
    assert model.weight.dtype == torch.float32


def test_dense_values_can_be_freed():
    model, plan, inputs = sparse("linear")
    dense = copy.deepcopy(model)
    ps.accelerate(model, formats={"weight": [[1, "csr"]]}, keep_dense=False)
    assert model.weight.original is None
    with torch.no_grad():
        close(model(*inputs), dense(*inputs))
        for other in (model, copy.deepcopy(model)):
            assert torch.equal(other.state_dict()["weight"], dense.weight)
            assert torch.equal(other.weight.sum(), dense.weight.sum())
            assert other.weight.shape == (48, 32)
    with pytest.raises(RuntimeError, match="freed its dense values"):
        ps.restore(model)
    other = ps.squash(ps.sparsify(nn.Linear(32, 48), 0.9))
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.float32):
            close(
                model.to("cpu").to(dtype)(inputs[0].to(dtype)), dense.to(dtype)(inputs[0].to(dtype))
            )
            assert model.weight.original is None
        model.load_state_dict(other.state_dict())
        close(model(*inputs), other(*inputs))
        nn.init.constant_(model.weight, 0.5)  # no zeros are left: dense again
        assert model.weight.original is not None
        nn.init.constant_(other.weight, 0.5)
        close(model(*inputs), other(*inputs))
    masked = ps.sparsify(nn.Linear(32, 48), 0.9)
    with pytest.raises(ValueError, match=r"Call parasparse\.squash first"):
        ps.accelerate(masked, formats=plan, keep_dense=False)


def test_every_way_to_write_is_followed():
    dense, plan, inputs = sparse("linear")
    for write in (
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.eye(48)[:, :32]),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: w.__imul__(2),
        lambda w: nn.init.zeros_(w),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: torch.mul(w, 2, out=w),
        lambda w: setattr(w, "data", torch.eye(48)[:, :32].double().float()),
        lambda w: nn.init.constant_(tensor=w, val=0.1),
        lambda w: w[:32].zero_(),
        lambda w: w.view(-1).mul_(2),
        lambda w: w.T.mul_(2),
        lambda w: w.detach().mul_(2),
        lambda w: w.split([32, 16])[0].mul_(2),
        lambda w: w.chunk(2)[0].zero_(),
        lambda w: [row.mul_(2) for row in w],
        lambda w: F.relu(w, inplace=True),
    ):
        model, other = ps.accelerate(copy.deepcopy(dense), formats=plan), copy.deepcopy(dense)
        with torch.no_grad():
            write(model.weight)
            write(other.weight)
            close(model(*inputs), other(*inputs))
            assert torch.equal(model.state_dict()["weight"], other.weight)
        assert torch.equal(ps.restore(model).weight, other.weight)


def test_a_reference_from_before_is_followed():
    dense, plan, inputs = sparse("linear")
    parameter = dense.weight
    ema = torch.optim.swa_utils.AveragedModel(dense)
    ps.accelerate(dense, formats=plan)
    ps.accelerate(ema, formats=plan)
    with torch.no_grad():
        parameter.mul_(3)
        close(dense(*inputs), F.linear(*inputs, parameter, dense.bias))
        ema.update_parameters(dense)
        close(ema(*inputs), dense(*inputs))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, stack: stack.original.mul_(3),
        lambda m, stack: stack.original.detach()[:3].zero_(),
        lambda m, stack: setattr(m, "weight", torch.ones(48, 32)),
        lambda m, stack: setattr(m, "weight", nn.Parameter(torch.ones(48, 32))),
        lambda m, stack: stack[0].mask_(torch.eye(48)[:, :32]),
        lambda m, stack: stack[0].mask.logical_not_(),
        lambda m, stack: m.double(),
    ],
    ids=["in place", "view", "assigned", "retied", "mask", "mask in place", "dtype"],
)
def test_a_masked_model_follows_its_weights_and_masks(change):
    dense = ps.sparsify(nn.Linear(32, 48), 0.8)
    model = ps.accelerate(copy.deepcopy(dense), formats={"weight": [[1, "csr"]]})
    with torch.no_grad():
        for one in (model, dense):
            change(one, one.parametrizations.weight)
        inputs = q.to(dense.bias.dtype)
        close(model(inputs), dense(inputs))
        new = {"parametrizations.weight.original": torch.randn(48, 32, dtype=inputs.dtype)}
        for _ in range(2):
            close(*(torch.func.functional_call(one, new, (inputs,)) for one in (model, dense)))
        close(model(inputs), dense(inputs))
    assert list(weights_in(model))


def test_no_gradient_is_lost_in_silence():
    model, plan, inputs = sparse("linear")
    ps.accelerate(model, formats=plan)
    for use in (lambda w: inputs[0] @ w.T, lambda w: (w**2).sum(), lambda w: w.clone()):
        with pytest.raises(RuntimeError, match="no gradient goes through them"):
            use(model.weight)
    masked = ps.sparsify(nn.Linear(32, 48).requires_grad_(False), 0.8)
    ps.accelerate(masked, formats={"weight": [[1, "csr"]]})
    masked(*inputs)
    with pytest.raises(RuntimeError, match="no gradient goes through them"):
        masked.requires_grad_(True)(*inputs)
    masked.requires_grad_(False)(*inputs)


@torch.no_grad()
def test_double_under_autocast_stays_double():
    dense, plan, _ = sparse("float64")
    with torch.autocast("cpu", torch.bfloat16):
        assert ps.accelerate(dense, formats=plan)(x(5, 32).double()).dtype == torch.float64


def test_transforms_of_torch_func_see_the_dense_weight():
    dense, plan, inputs = sparse("linear")
    model = ps.accelerate(copy.deepcopy(dense), formats=plan)
    with torch.no_grad():
        close(torch.vmap(model)(inputs[0]), dense(inputs[0]))
        got, want = (torch.func.jvp(m, inputs, inputs) for m in (model, dense))
        close(got, want)


def test_inference_mode_is_fine():
    dense, plan, inputs = sparse("linear")
    model = copy.deepcopy(dense)
    with torch.inference_mode():
        close(ps.accelerate(model, formats=plan)(*inputs), dense(*inputs))
    with torch.no_grad():
        close(model(*inputs), dense(*inputs))
    ps.restore(model)
    model(*inputs).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_autocast_gives_what_it_gives_dense(name):
    if name == "lstm":
        need_bfloat16_lstm()
    dense, plan, inputs = sparse(name)
    model = ps.accelerate(copy.deepcopy(dense), formats=plan)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = (torch.utils._pytree.tree_leaves(m(*inputs))[0] for m in (model, dense))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["as it is", "compiled", "freed"])
@case
@torch.no_grad()
def test_nothing_is_kept_of_a_mode_without_values(name, kind):
    dense, plan, inputs = sparse(name)
    if kind == "compiled" and name != "float64":
        plan = {weight: [[1, "compiled"]] for weight in plan}
    model = ps.accelerate(copy.deepcopy(dense), formats=plan, keep_dense=kind != "freed")
    want, found = dense(*inputs), list(weights_in(model))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        shapes = [t.shape for t in tree_leaves(want) if t is not None]
        for given in (fake, inputs):  # the second may meet real tensors in the kernels
            got = [t for t in tree_leaves(model(*given)) if t is not None]
            assert [t.shape for t in got] == shapes
            assert all(isinstance(t, FakeTensor) for t in got)
        assert all(weight.plain().shape == weight.shape for _, weight in found)
    close(model(*inputs), want)


def test_what_apply_does_to_tensors_is_followed():
    dense, plan, inputs = sparse("linear")
    for change in (torch.Tensor.share_memory_, torch.Tensor.zero_, lambda t: t, lambda t: 2 * t):
        model = ps.accelerate(copy.deepcopy(dense), formats=plan)._apply(change)
        other = copy.deepcopy(dense)._apply(change)
        with torch.no_grad():
            close(model(*inputs), other(*inputs))
        assert ps.restore(model).weight.is_shared() == other.weight.is_shared()
        model(*inputs).sum().backward()


@pytest.mark.parametrize("format_", ["csr", "bag", "compiled"])
@pytest.mark.parametrize("keep_dense", [True, False])
@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "lstm", "cross-attention"])
def test_weights_go_from_one_mode_to_the_other(name, made_in, keep_dense, format_):
    with made_in():
        build, inputs = CASES[name]
        dense = build().eval()
        weights = {n: p for n, p in dense.named_parameters() if p.ndim > 1}
        for weight in weights.values():
            weight.mul_(torch.rand_like(weight) < 0.2)
    plan = {n: [[1, format_]] for n in weights}
    with torch.no_grad():
        want = dense(*inputs)
    model = ps.accelerate(copy.deepcopy(dense), formats=plan, keep_dense=keep_dense)
    own = ps.accelerate(dense, formats=plan, keep_dense=keep_dense)
    for one in (model, own):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                close(one(*inputs), want)
            copied, state = copy.deepcopy(one), one.state_dict()
            close(state, dense.state_dict())
            with torch.no_grad():
                close(copied(*inputs), want)
        if keep_dense:
            with torch.no_grad():
                close(ps.restore(one)(*inputs), want)
