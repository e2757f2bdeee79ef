"""The kernel: exact values, and every transform of torch.func."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

import parasparse as ps
from parasparse.masks.apply import _FEW, apply_mask, apply_mask_straight_through

DTYPES = [
    torch.half,
    torch.bfloat16,
    torch.float,
    torch.double,
    torch.cfloat,
    torch.cdouble,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
NASTY = [math.inf, -math.inf, math.nan, -0.0, 0.0, 1.0, -3.5]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


each_size = pytest.mark.parametrize("repeats", [1, 2 * _FEW], ids=["few", "many"])


@each_size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nasty_values_pass_bit_for_bit_and_vanish_to_plus_zero(dtype, repeats):
    weight = torch.tensor(NASTY * 2).to(dtype).repeat_interleave(repeats)
    mask = torch.tensor([True] * len(NASTY) + [False] * len(NASTY)).repeat_interleave(repeats)
    out = apply_mask(weight, mask)
    assert torch.equal(bits(out)[: bits(out).numel() // 2], bits(weight[: len(mask) // 2]))
    assert not bits(out)[bits(out).numel() // 2 :].any()


@each_size
@pytest.mark.parametrize("dtype", DTYPES[:6], ids=str)
def test_nasty_gradients_vanish_to_plus_zero(dtype, repeats):
    grad = torch.tensor(NASTY).to(dtype).repeat_interleave(repeats)
    weight = torch.ones(len(grad), dtype=dtype, requires_grad=True)
    apply_mask(weight, torch.zeros(len(grad), dtype=torch.bool)).backward(grad)
    assert not bits(weight.grad).any()


@pytest.mark.parametrize(
    "dtype", [torch.float, torch.half, torch.cfloat, torch.float8_e4m3fn], ids=str
)
def test_real_masks_multiply_and_give_plus_zero(dtype):
    weight = torch.tensor([2.0, -2.0, math.inf, math.nan]).to(dtype)
    mask = torch.tensor([0.5, -1.0, 0.0, 0.0])
    mask = mask if dtype.itemsize == 1 else mask.to(dtype.to_real())
    out = apply_mask(weight, mask)
    assert out.dtype == dtype
    assert out[:2].to(torch.cfloat).tolist() == [1, 2]
    assert not bits(out[2:]).any()


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(0, 2**20))
def test_agrees_with_where(values, seed):
    weight = torch.tensor(values)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(bits(apply_mask(weight, mask)), bits(torch.where(mask, weight, 0)))


def test_conjugate_and_negated_views_are_read_right():
    weight = torch.randn(4, dtype=torch.cfloat)
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(apply_mask(weight.conj(), mask), torch.where(mask, weight.conj(), 0))
    assert torch.equal(apply_mask(weight.conj().imag, mask), torch.where(mask, -weight.imag, 0))


@pytest.mark.parametrize("dtype", [torch.double, torch.cdouble], ids=str)
@pytest.mark.parametrize("kind", ["bool", "real"])
def test_gradcheck_once_and_twice_forward_and_backward(dtype, kind):
    weight = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    mask = torch.rand(3, 4) < 0.5
    mask = mask if kind == "bool" else mask * torch.randn(3, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(
        lambda w: apply_mask(w, mask), weight, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda w: apply_mask(w, mask), weight)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_vectorised_jacobians_agree_with_the_loop(strategy):
    weight, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    found = torch.autograd.functional.jacobian(
        lambda w: apply_mask(w, mask).tanh(), weight, vectorize=True, strategy=strategy
    )
    looped = torch.autograd.functional.jacobian(lambda w: apply_mask(w, mask).tanh(), weight)
    torch.testing.assert_close(found, looped)


@pytest.mark.parametrize(
    ("build", "shape"),
    [(lambda: nn.Linear(300, 200), (2, 300)), (lambda: nn.Conv2d(30, 20, 3), (2, 30, 8, 8))],
    ids=["linear", "conv"],
)
def test_of_the_weights_size_only_mask_and_masked_weight_are_kept_for_backward(build, shape):
    layer = ps.sparsify(build(), 0.9)
    mask = ps.mask_of(layer, "weight")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.ones(shape, requires_grad=True))
    large = {t.data_ptr(): t for t in kept if t.numel() == mask.numel()}
    assert large.pop(mask.data_ptr()).dtype == torch.bool  # the mask itself, not a copy
    (weight,) = large.values()
    assert weight.count_nonzero() == mask.sum()


def masked_net():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    return ps.sparsify(model, 0.5)


def dense_twin(model):
    import copy

    return ps.squash(copy.deepcopy(model))


def loss(model):
    x = torch.linspace(-1, 1, 8).view(2, 4)
    return lambda parameters: functional_call(model, parameters, (x,)).pow(2).sum()


def test_hessian_vector_product_is_the_dense_one_where_kept_and_zero_elsewhere():
    model = masked_net()
    weight = model[0].parametrizations.weight.original
    mask = ps.mask_of(model, "0.weight")
    x = torch.randn(3, 4)
    (first,) = torch.autograd.grad(model(x).pow(2).sum(), weight, create_graph=True)
    vector = torch.randn_like(weight)
    (product,) = torch.autograd.grad((first * vector).sum(), weight)

    twin = dense_twin(model)
    (first,) = torch.autograd.grad(twin(x).pow(2).sum(), twin[0].weight, create_graph=True)
    (wanted,) = torch.autograd.grad((first * vector * mask).sum(), twin[0].weight)
    torch.testing.assert_close(product, wanted * mask)


def test_torch_func_grad_jvp_and_hessian_agree_with_the_dense_network():
    model = masked_net()
    twin = dense_twin(model)
    key = "0.parametrizations.weight.original"
    value = model.get_parameter(key).detach()
    mask = ps.mask_of(model, "0.weight")
    rest = {k: v.detach() for k, v in model.named_parameters() if k != key}
    dense_rest = {k: v.detach() for k, v in twin.named_parameters() if k != "0.weight"}

    def sparse(w):
        return loss(model)({**rest, key: w})

    def dense(w):
        return loss(twin)({**dense_rest, "0.weight": w * mask})

    torch.testing.assert_close(grad(sparse)(value), grad(dense)(value))
    tangent = torch.randn_like(value)
    torch.testing.assert_close(jvp(sparse, (value,), (tangent,)), jvp(dense, (value,), (tangent,)))
    torch.testing.assert_close(hessian(sparse)(value), hessian(dense)(value))


def test_vmap_runs_an_ensemble_whose_members_have_masks_of_their_own():
    import copy

    models = [
        ps.sparsify(nn.Sequential(nn.Linear(4, 3)), ps.Prune(0.5, score=ps.scores.random))
        for _ in range(3)
    ]
    state = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(2, 4)
    out = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(*state)
    torch.testing.assert_close(out, torch.stack([model(x) for model in models]))


def test_per_sample_gradients_agree_with_a_loop():
    model = masked_net()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(5, 4)

    def one(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).sum()

    grads = vmap(grad(one), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad)


@pytest.mark.parametrize("kind", ["bool", "real"])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embedding_gradients_stay_sparse_and_masked(kind, layer):
    model = layer(7, 3, sparse=True)
    mask = torch.rand(7, 3) < 0.5
    ps.sparsify(model, {"weight": mask if kind == "bool" else mask * 0.5})
    dense = nn.Embedding(7, 3, _weight=ps.stored(model, "weight").detach().clone())
    index = torch.tensor([[1, 1, 4]])
    model(index).sum().backward()
    given = model.parametrizations.weight.original.grad
    assert given.layout == torch.sparse_coo
    out = dense(index) if layer is nn.Embedding else dense(index).mean(1)
    out.sum().backward()
    torch.testing.assert_close(
        given.to_dense(), dense.weight.grad * mask * (1 if kind == "bool" else 0.5)
    )
    before = model.parametrizations.weight.original.detach().clone()
    torch.optim.SparseAdam(list(model.parameters())).step()
    changed = model.parametrizations.weight.original != before
    assert changed.any()
    assert not changed[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_straight_through_masks_forward_only(dtype):
    weight = torch.randn(4, 5, dtype=dtype)
    weight[0, 0] = math.nan
    weight[0, 1] = -0.0
    weight.requires_grad_()
    mask = torch.rand(4, 5) < 0.5
    mask[0, 0], mask[0, 1] = False, True
    out = apply_mask_straight_through(weight, mask)
    assert torch.equal(out, apply_mask(weight.detach(), mask))
    grad = torch.randn(4, 5, dtype=dtype)
    out.backward(grad)
    assert torch.equal(weight.grad, grad)


def test_straight_through_compiles_traces_and_takes_transforms():
    mask = torch.rand(4, 5) < 0.5

    def loss(weight):
        return apply_mask_straight_through(weight, mask).sin().sum()

    weight = torch.randn(4, 5)
    want = torch.where(mask, weight, 0.0).cos()
    torch.testing.assert_close(torch.func.grad(loss)(weight), want)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(weight[None])[0], want)
    _, tangent = torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(tangent, want.sum())
    leaf = weight.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf).backward()
    torch.testing.assert_close(leaf.grad, want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        traced = torch.jit.trace(lambda w: apply_mask_straight_through(w, mask), weight)
    assert torch.equal(traced(weight), torch.where(mask, weight, 0.0))
