"""A compact model computes and trains as the masked model does."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import parasparse as ps
from parasparse.acceleration.compact.products import product, sampled
from parasparse.acceleration.compact.weight import CompactWeight
from parasparse.masks.places import Places
from tests.acceleration.cases import CASES, x
from tests.helpers.machine import needs_mkl

pytestmark = [
    needs_mkl,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
case = pytest.mark.parametrize("name", CASES)


def both(name, dtype=torch.float64):
    """Return a masked model, the same compact, and inputs of which the floating ones train."""
    build, inputs = CASES[name]
    torch.manual_seed(0)
    rules = {"embedding.weight": 0.8} if name == "tied" else 0.8
    masked = ps.sparsify(build().eval().to(dtype), rules)
    compact = ps.compact(copy.deepcopy(masked))
    as_double = torch.utils._pytree.tree_map(
        lambda t: t.to(dtype) if t.is_floating_point() else t, inputs
    )
    return masked, compact, as_double


def outputs(model, inputs):
    return [t for t in tree_leaves(model(*inputs)) if t is not None]


def dense_grads(model):
    """Return the gradient of each parameter in its dense shape."""
    grads = {}
    for name, parameter in model.named_parameters():
        stack = model.get_submodule(name.rpartition(".")[0])
        grad = parameter.grad
        places = stack[0] if name.endswith("original") else None
        grads[name] = places(grad) if isinstance(places, Places) else grad
    return grads


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@case
def test_outputs_and_gradients_are_those_of_the_masked_model(name):
    masked, compact, inputs = both(name)
    assert [type(m) for m in compact.children()] == [type(m) for m in masked.children()]
    close(outputs(compact, inputs), outputs(masked, inputs))
    found = []
    for model in (masked, compact):
        taken = [
            t.clone().requires_grad_() if t.is_floating_point() else t for t in tree_leaves(inputs)
        ]
        given = torch.utils._pytree.tree_unflatten(
            taken, torch.utils._pytree.tree_structure(inputs)
        )
        sum(t.square().sum() for t in outputs(model, given)).backward()
        found.append((dense_grads(model), [t.grad for t in taken]))
    close(*found)


@case
def test_nothing_dense_is_stored(name):
    masked, compact, _ = both(name)
    for key, mask in ps.named_masks(masked):
        site = compact.get_submodule(key.rpartition(".")[0])
        stack = site.parametrizations[key.rpartition(".")[2]]
        assert stack.original.shape == (int(mask.sum()),)
        entries = {tensor.numel() for tensor in stack.buffers()}
        assert mask.numel() not in entries
        assert ps.mask_of(compact, key).equal(mask)
    names = [name for name, _ in masked.named_parameters()]
    assert [name for name, _ in compact.named_parameters()] == names


@case
def test_expand_gives_back_the_same_bits(name):
    masked, compact, _ = both(name)
    ps.squash(masked)
    parameters = dict(compact.named_parameters())
    assert ps.expand(compact) is compact
    assert all(p is parameters[n] for n, p in compact.named_parameters())
    back = ps.squash(compact).state_dict()
    assert back.keys() == masked.state_dict().keys()
    assert all(back[key].equal(value) for key, value in masked.state_dict().items())


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_the_state_of_the_optimizer(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    models = [ps.sparsify(copy.deepcopy(model), 0.7) for _ in range(2)]
    optimizers = [OPTIMIZERS[kind](m.parameters()) for m in models]
    batches = torch.randn(50, 4, 8, dtype=torch.float64)
    for number, batch in enumerate(batches):
        if number == 10:
            ps.compact(models[1], optimizer=optimizers[1])
        if number == 40:
            ps.expand(models[1], optimizer=optimizers[1])
        for each, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            each(batch).square().mean().backward()
            optimizer.step()
        if number == 25:
            values = models[1][0].parametrizations.weight.original
            state = optimizers[1].state[values]
            shapes = {t.shape for t in state.values() if isinstance(t, torch.Tensor) and t.ndim}
            assert shapes == {values.shape}
    close(models[1](batches[0]), models[0](batches[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_first_and_second_order(dtype):
    torch.manual_seed(0)
    places = Places.of(torch.rand(5, 4) > 0.5)
    indices = places.indices()
    values, a, b = (
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((len(places),), (3, 4), (3, 5))
    )
    for function, tensors in (
        (lambda v, x: product(x, v, indices), (values, a)),
        (lambda v, x: product(x, v, indices, transposed=True), (values, b)),
        (lambda g, x: sampled(g, x, indices), (b, a)),
    ):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
def test_places_are_those_of_the_mask(seed, outputs, inputs, share):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(outputs, inputs, generator=generator) < share
    places = Places.of(mask)
    assert len(places) == mask.sum()
    assert places.mask().equal(mask)
    assert all(tensor.dtype == torch.int32 for tensor in places.indices())
    weight = torch.randn(outputs, inputs, generator=generator)
    assert places(places.right_inverse(weight)).equal(weight * mask)
    rows, columns = mask.T.nonzero().T
    assert places.rows.tolist() == columns.tolist()
    assert places.order.argsort().tolist() == [
        (rows * outputs + columns).tolist().index(int(c * outputs + r))
        for r, c in mask.nonzero().tolist()
    ]


def linear():
    torch.manual_seed(0)
    return ps.compact(ps.sparsify(nn.Linear(8, 6), 0.5))


def test_other_operations_get_dense_values_with_gradients():
    model = linear()
    weight = model.weight
    assert isinstance(weight, CompactWeight)
    assert weight.shape == (6, 8)
    assert weight.requires_grad
    dense = ps.stored(model, "weight")
    assert (weight * 2).equal(dense * 2)
    assert torch.einsum("oi,ni->no", weight, torch.ones(2, 8)).shape == (2, 6)
    weight.abs().sum().backward()
    values = model.parametrizations.weight.original
    assert values.grad.equal(values.detach().sign())
    with pytest.raises(RuntimeError, match=r"must not be changed in place.*original"):
        weight.mul_(2)


def test_copies_and_pickles_are_independent():
    model, inputs = linear(), x(3, 8)
    want = model(inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]  # fmt: skip
    for other in copies:
        assert other(inputs).equal(want)
        with torch.no_grad():
            other.parametrizations.weight.original.zero_()
        assert ps.mask_of(other, "weight").equal(ps.mask_of(model, "weight"))
    assert model(inputs).equal(want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model, inputs = linear(), x(3, 8)
    want = model(inputs).detach()
    with torch.autocast("cpu", dtype):
        got = model(inputs)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
    half = model.to(dtype)(inputs.to(dtype))
    assert half.dtype == dtype
    half.sum().backward()
    torch.testing.assert_close(half.detach().float(), want, rtol=0.02, atol=0.02)


def test_a_compact_model_compiles_in_one_graph():
    masked, compact, inputs = both("encoder", torch.float32)
    compiled = torch.compile(compact, backend="aot_eager", fullgraph=True)
    for model in (masked, compiled):
        outputs(model, inputs)[0].square().sum().backward()
    torch.testing.assert_close(dense_grads(compact), dense_grads(masked), rtol=1e-3, atol=1e-4)


REFUSED = {
    "soft": lambda: ps.sparsify(nn.Linear(4, 4), {"weight": ps.Gate()}),
    "real": lambda: ps.sparsify(nn.Linear(4, 4), {"weight": torch.full((4, 4), 0.5)}),
    "unset": lambda: ps.sparsify(nn.Linear(4, 4), {"weight": ps.Fixed(None)}),
    "parametrized": lambda: ps.sparsify(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), 0.5
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compact_is_refused_and_unchanged(name):
    model = nn.Sequential(ps.sparsify(nn.Linear(4, 4), 0.5), REFUSED[name]())
    before = repr(model), [p.shape for p in model.parameters()]
    with pytest.raises(RuntimeError, match='"1.weight"'):
        ps.compact(model)
    assert (repr(model), [p.shape for p in model.parameters()]) == before
    assert ps.compact(model, "0") is model
    with pytest.raises(ValueError, match="bias"):
        ps.compact(ps.sparsify(nn.Linear(4, 4), {"bias": 0.5}), "bias")
