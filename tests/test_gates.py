import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from parasparse import gates
from parasparse.counts import num_kept

reals = st.floats(-6, 6)


def integral(function, low, high, steps=200_000):
    """By the midpoint rule."""
    x = (torch.arange(steps, dtype=torch.float64) + 0.5) * (high - low) / steps + low
    return float(function(x).sum() * (high - low) / steps)


@given(reals, st.floats(0.1, 50), reals)
def test_sigmoid_is_its_formula(logit, temperature, init):
    s = torch.tensor(logit, dtype=torch.double)
    scale = 1 + math.exp(-init)
    want = scale / (1 + math.exp(-temperature * logit))
    assert gates.sigmoid(s, temperature, init=init).item() == pytest.approx(want)
    want = scale if logit > 0 else 0.0
    assert gates.sigmoid(s, temperature, init=init, hard=True).item() == pytest.approx(want)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float, torch.double])
def test_sigmoid_keeps_its_dtype_and_takes_temperatures_that_half_precision_does_not_hold(dtype):
    logits = torch.tensor([-1.0, 1e-3, 2.0], dtype=dtype)
    soft, hard = (gates.sigmoid(logits, 1e6, init=0.5, hard=hard) for hard in (False, True))
    assert soft.dtype == hard.dtype == dtype
    assert torch.equal(soft, hard)


@given(reals, st.floats(0.01, 0.99))
def test_hard_concrete_is_its_formula(logit, noise):
    s, u = torch.tensor(logit, dtype=torch.double), torch.tensor(noise, dtype=torch.double)
    concrete = 1 / (1 + math.exp(-(math.log(noise / (1 - noise)) + logit) / (2 / 3)))
    want = min(1, max(0, concrete * 1.2 - 0.1))
    assert gates.hard_concrete(s, u).item() == pytest.approx(want, abs=1e-12)
    want = min(1, max(0, 1.2 / (1 + math.exp(-logit)) - 0.1))
    assert gates.hard_concrete(s).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 2.0])
def test_the_penalty_of_hard_concrete_is_how_often_it_is_open(logit):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(400_000, generator=generator, dtype=torch.double)
    logits = torch.full_like(noise, logit)
    often = (gates.hard_concrete(logits, noise) > 0).double().mean().item()
    assert gates.hard_concrete_penalty(logits[0]).item() == pytest.approx(often, abs=3e-3)


def test_hard_concrete_has_gradients():
    logits = torch.randn(20, dtype=torch.double, requires_grad=True)
    noise = torch.rand(20, dtype=torch.double) * 0.98 + 0.01
    assert torch.autograd.gradcheck(lambda s: gates.hard_concrete(s, noise), logits)
    assert torch.autograd.gradcheck(gates.hard_concrete_penalty, logits)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0, 1))
@example([1] * 10, 0.05)  # half an entry, but a little more in 32 bits
def test_straight_through_keeps_the_highest_and_passes_the_gradient(values, sparsity):
    scores = torch.tensor(values, dtype=torch.float, requires_grad=True)
    mask = gates.straight_through(scores, sparsity)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    want = set(order[: num_kept(len(values), sparsity)])
    assert {i for i, value in enumerate(mask.tolist()) if value == 1} == want
    assert set(mask.tolist()) <= {0.0, 1.0}
    grad = torch.randn(len(values))
    mask.backward(grad)
    assert torch.equal(scores.grad, grad)


def test_straight_through_gives_the_gradient_of_movement_pruning():
    scores = torch.randn(4, 3, requires_grad=True)
    weight, x = torch.randn(4, 3), torch.randn(5, 3)
    out = x @ (weight * gates.straight_through(scores, 0.5)).T
    out.square().sum().backward()
    effective = (2 * out.detach()).T @ x  # dL/d(w m)
    torch.testing.assert_close(scores.grad, effective * weight)


def test_a_sparsity_in_a_tensor_needs_no_new_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    run = torch.compile(gates.straight_through, backend=backend, fullgraph=True)
    scores = torch.randn(6, 5)
    for sparsity in (0.1, 0.5, 0.9):
        mask = run(scores, torch.tensor(sparsity, dtype=torch.double))
        assert int(mask.sum()) == num_kept(30, sparsity)
    assert len(graphs) == 1


@given(reals, reals)
def test_soft_threshold_is_its_formula_and_that_of_a_plain_soft_shrink(value, logit):
    weight, s = torch.tensor([value, -value], dtype=torch.double), torch.tensor(logit).double()
    threshold = torch.sigmoid(s).item()
    want = nn.functional.softshrink(weight, threshold)
    torch.testing.assert_close(gates.soft_threshold(weight, s), want, rtol=0, atol=1e-12)


def test_soft_threshold_has_gradients_and_keeps_the_phase():
    weight = (torch.randn(5, 4, dtype=torch.double) * 2).requires_grad_()
    logits = torch.randn(5, 1, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(gates.soft_threshold, (weight, logits))
    z = torch.randn(50, dtype=torch.cdouble)
    out = gates.soft_threshold(z, torch.tensor(-1.0))
    kept = out != 0
    torch.testing.assert_close(out[kept].angle(), z[kept].angle())
    size = z.abs() - torch.sigmoid(torch.tensor(-1.0)).double()
    torch.testing.assert_close(out.abs(), size.clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.double, torch.cdouble])
def test_variational_dropout_draws_with_its_variance(dtype):
    torch.manual_seed(0)
    weight, log_variance = torch.tensor(1.5, dtype=dtype), torch.tensor(-1.0).double()
    noise = torch.randn(200_000, dtype=dtype)
    drawn = gates.variational_dropout(weight, log_variance, noise)
    assert (drawn - weight).abs().square().mean().item() == pytest.approx(math.exp(-1), rel=2e-2)
    assert gates.variational_dropout(weight, log_variance) is weight
    alpha = gates.log_alpha(weight, log_variance).exp().item()
    assert alpha == pytest.approx(math.exp(-1) / 1.5**2)


def test_the_real_penalty_is_the_integral_but_for_a_constant():
    """KL is -1/2 log alpha + E log|1 + sqrt(alpha) e| up to a constant, fitted within 0.01."""

    def exact(log_alpha):
        root = math.exp(log_alpha / 2)

        def density(e):
            normal = torch.exp(-(e**2) / 2) / math.sqrt(2 * math.pi)
            return normal * torch.log((1 + root * e).abs().clamp(min=1e-300))

        return -log_alpha / 2 + integral(density, -9, 9)

    far = exact(9.0)
    for value in (-4.0, -2.0, -1.0, 0.0, 1.0, 3.0):
        got = gates.variational_dropout_penalty(torch.tensor(value, dtype=torch.double)).item()
        assert got == pytest.approx(exact(value) - far, abs=0.02)


@given(reals)
def test_the_real_penalty_is_equation_14_of_its_paper(log_alpha):
    negative = 0.63576 / (1 + math.exp(-1.87320 - 1.48695 * log_alpha))
    negative -= math.log1p(math.exp(-log_alpha)) / 2 + 0.63576
    got = gates.variational_dropout_penalty(torch.tensor(log_alpha, dtype=torch.double))
    assert got.item() == pytest.approx(-negative)


@pytest.mark.parametrize("value", [-4.0, -2.0, -1.4, -1.3, 0.0, 1.0, 5.0])
def test_the_complex_penalty_is_its_integral(value):
    x = math.exp(-value)
    want = integral(lambda t: -torch.expm1(-t) / t, 0, x)
    got = gates.variational_dropout_penalty(
        torch.tensor(value, dtype=torch.double), is_complex=True
    )
    assert got.item() == pytest.approx(want, rel=1e-9)


def test_the_complex_penalty_is_the_divergence_by_sampling():
    """But for a constant: log|mu|^2 - log sigma^2 + E log|1 + sqrt(alpha) e|^2."""
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(2_000_000, generator=generator, dtype=torch.cdouble)

    def sampled(log_alpha):
        return -log_alpha + (1 + math.exp(log_alpha / 2) * e).abs().log().mean().item() * 2

    for value in (-2.0, 0.0, 2.0):
        got = gates.variational_dropout_penalty(
            torch.tensor(value, dtype=torch.double), is_complex=True
        )
        far = sampled(12.0)
        assert got.item() == pytest.approx(sampled(value) - far, abs=5e-3)


@pytest.mark.parametrize("is_complex", [False, True])
def test_penalties_have_gradients_fall_and_end_at_zero(is_complex):
    def penalty(relevance):
        return gates.variational_dropout_penalty(relevance, is_complex=is_complex)

    x = torch.linspace(-9, 14, 60, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, x)
    values = penalty(x.detach())
    assert (values.diff() < 0).all()
    assert values[-1].item() == pytest.approx(0, abs=1e-5)
    assert penalty(x.detach().float()).dtype == torch.float32


def test_the_complex_penalty_goes_on_where_exp_is_infinite():
    relevance = torch.tensor([-699.0, -701.0, -5000.0, 5000.0], dtype=torch.double)
    got = gates.variational_dropout_penalty(relevance, is_complex=True)
    euler = 0.5772156649015329
    assert got.tolist() == pytest.approx([euler + 699, euler + 701, euler + 5000, 0])


def test_the_complex_penalty_has_its_exact_slope_where_it_is_tiny():
    relevance = torch.linspace(10, 20, 50, dtype=torch.double, requires_grad=True)
    gates.variational_dropout_penalty(relevance, is_complex=True).sum().backward()
    want = torch.expm1(-(-relevance.detach()).exp())
    torch.testing.assert_close(relevance.grad, want, rtol=1e-10, atol=0)


def test_the_complex_penalty_knows_torch_func_and_forward_mode():
    relevance = torch.linspace(-8, 8, 20, dtype=torch.double)

    def total(x):
        return gates.variational_dropout_penalty(x, is_complex=True).sum()

    (want,) = torch.autograd.grad(total(relevance.requires_grad_()), relevance)
    relevance = relevance.detach()
    torch.testing.assert_close(torch.func.grad(total)(relevance), want)
    torch.testing.assert_close(torch.func.jacfwd(total)(relevance), want)
    one_by_one = torch.func.vmap(torch.func.grad(total))(relevance[:, None])
    torch.testing.assert_close(one_by_one[:, 0], want)
    assert torch.autograd.gradcheck(total, relevance.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(total, relevance)
