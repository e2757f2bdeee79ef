"""Weights written through the parametrizations under a mask."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import parasparse as ps
from tests.helpers.cases import PairLinear

weight_norm = parametrizations.weight_norm
LAYERS = {
    "rows": (lambda: nn.Linear(12, 10), 0),
    "columns": (lambda: nn.Linear(12, 10), 1),
    "whole": (lambda: nn.Linear(12, 10), None),
    "taps of a convolution": (lambda: nn.Conv1d(6, 8, 5), 2),
    "channels of a convolution": (lambda: nn.Conv2d(6, 8, 3), 1),
}


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


def some(shape):
    """A mask that drops a whole slice in each dimension."""
    mask = torch.rand(shape) < 0.5
    for dim in range(len(shape)):
        mask.select(dim, 1).fill_(False)
    return mask


def near(got, want):
    kept = want != 0
    assert not got[~kept].any()
    assert not got[~kept].signbit().any()
    off = (got - want)[kept].double().abs() / want[kept].double().abs()
    assert off.max() <= 8 * torch.finfo(want.dtype).eps


def parameters(model):
    return [(name, id(tensor)) for name, tensor in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("build", "dim"), LAYERS.values(), ids=LAYERS)
def test_squash_writes_zeros_through_weight_norm_when_asked(build, dim, dtype):
    torch.manual_seed(0)
    model = weight_norm(build().to(dtype), dim=dim)
    keys, held = list(model.state_dict()), parameters(model)
    ps.sparsify(model, {"weight": some(model.weight.shape)})
    want = model.weight.detach().clone()
    assert ps.squash(model, keep_parametrizations=True) is model
    assert (list(model.state_dict()), parameters(model)) == (keys, held)
    assert not ps.is_sparse(model)
    near(model.weight.detach(), want)
    fresh = weight_norm(build().to(dtype), dim=dim)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.weight, model.weight)
    (model.weight * torch.rand_like(model.weight)).sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "weight" in n)
    parametrize.remove_parametrizations(model, "weight")
    near(model.weight.detach(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_of_long_sums_do_not_scale_the_weights(dtype):
    torch.manual_seed(0)
    model = weight_norm(nn.Linear(4, 20_000).to(dtype), dim=1)
    want = ps.sparsify(model, 0.5).weight.detach().clone()
    near(ps.squash(model, keep_parametrizations=True).weight.detach(), want)


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_parametrizations_that_cannot_compute_the_weight_are_replaced(wrap):
    model = ps.sparsify(wrap(nn.Linear(6, 6)), 0.5).eval()
    want = model.weight.detach().clone()
    ps.squash(model, keep_parametrizations=True)
    assert type(model) is nn.Linear
    assert torch.equal(model.weight, want)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_values_decide_whether_a_parametrization_stays(symmetric):
    model = nn.Linear(6, 6)
    parametrize.register_parametrization(model, "weight", Symmetric())
    mask = torch.ones(6, 6).tril() if not symmetric else torch.eye(6)
    want = ps.sparsify(model, {"weight": mask}).weight.detach().clone()
    ps.squash(model, keep_parametrizations=True)
    assert parametrize.is_parametrized(model) is symmetric
    assert torch.equal(model.weight, want)


def test_a_parametrization_with_state_of_its_own_follows():
    model = parametrizations.orthogonal(nn.Linear(6, 6))  # its right inverse writes a buffer
    want = ps.sparsify(model, {"weight": torch.ones(6, 6)}).weight.detach().clone()
    ps.squash(model, keep_parametrizations=True)
    assert parametrize.is_parametrized(model)
    torch.testing.assert_close(model.weight.detach(), want)


def test_ties_pairs_and_scaled_masks_are_written_once():
    torch.manual_seed(0)
    one, two = weight_norm(nn.Linear(6, 6)), weight_norm(nn.Linear(6, 6))
    for name in ("original0", "original1"):
        setattr(two.parametrizations.weight, name, getattr(one.parametrizations.weight, name))
    pair = PairLinear()
    for name in ("weight_re", "weight_im"):
        weight_norm(pair, name)
    for model in (nn.Sequential(one, two), pair):
        dense = copy.deepcopy(model)
        ps.sparsify(model, {"*": ps.Gate(init=0.5)})
        with torch.no_grad():
            want = [getattr(m, n) for m, n in computed(model)]
        ps.squash(model, keep_parametrizations=True)
        assert model.state_dict().keys() == dense.state_dict().keys()
        for (module, name), value in zip(computed(model), want, strict=True):
            near(getattr(module, name).detach(), value)
    assert one.parametrizations.weight.original1 is two.parametrizations.weight.original1


def computed(model):
    return [(m, name) for m in model.modules() if parametrize.is_parametrized(m)
            for name in m.parametrizations]  # fmt: skip


def test_rows_of_zeros_can_be_assigned_and_loaded_under_weight_norm():
    value = torch.randn(4, 4)
    value[1] = 0
    assigned, loaded = (ps.sparsify(weight_norm(nn.Linear(4, 4)), 0.0) for _ in range(2))
    assigned.weight = value
    loaded.load_state_dict({"weight": value, "bias": torch.zeros(4)})
    near(assigned.weight.detach(), value)
    near(loaded.weight.detach(), value)
