"""A real and an imaginary tensor have one mask, so their channels go together."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import assert_same


class Complex(nn.Module):
    """A linear layer as docs/how-to/complex.md writes it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        w, b = torch.randn(2, outputs, inputs).double(), torch.randn(2, outputs).double()
        self.weight = nn.ParameterDict({"real": w[0].clone(), "imag": w[1].clone()})
        self.bias = nn.ParameterDict({"real": b[0].clone(), "imag": b[1].clone()})

    def forward(self, z):
        weight = torch.complex(self.weight["real"], self.weight["imag"])
        return F.linear(z, weight, torch.complex(self.bias["real"], self.bias["imag"]))


class Parts(nn.Module):
    """The same for two real tensors."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight_re = nn.Parameter(torch.randn(outputs, inputs).double())
        self.weight_im = nn.Parameter(torch.randn(outputs, inputs).double())

    def forward(self, both):
        (re, im), (w, v) = both, (self.weight_re, self.weight_im)
        return re @ w.T - im @ v.T, re @ v.T + im @ w.T


class Apart(nn.Module):
    """Nothing but the mask joins the two."""

    def __init__(self):
        super().__init__()
        self.w_re, self.w_im = (nn.Parameter(torch.randn(16, 6)) for _ in range(2))
        self.one, self.two = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        return self.one((x @ self.w_re.T).relu()), self.two((x @ self.w_im.T).tanh())


class Polar(nn.Module):
    def __init__(self):
        super().__init__()
        self.size, self.angle = nn.Linear(6, 16).double(), nn.Linear(6, 16).double()
        self.last = nn.Linear(16, 4, dtype=torch.complex128)

    def forward(self, x):
        return self.last(torch.polar(self.size(x).relu(), self.angle(x)))


def one(batch=3):
    return torch.randn(batch, 6, dtype=torch.float64)


def numbers(batch=3):
    return torch.complex(one(batch), one(batch))


def both(batch=3):
    return ((one(batch), one(batch)),)


CASES = {
    "complex": (lambda: nn.Sequential(Complex(6, 16), Complex(16, 8), Complex(8, 4)), numbers),
    "parts": (lambda: nn.Sequential(Parts(6, 16), Parts(16, 4)), both),
    "apart": (lambda: Apart().double(), lambda: (one(),)),
    "polar": (Polar, lambda: (one(),)),
}


def built(name):
    build, inputs = CASES[name]
    return build(), inputs()


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_units_of_pairs_go_and_come_back(name, pairs):
    model, x = built(name)
    call = (lambda m: m(*x)) if isinstance(x, tuple) else (lambda m: m(x))
    ps.sparsify(model, ps.coupled(model, x).rules(0.5), pairs=pairs)
    want, before = call(model), sum(p.numel() for p in model.parameters())
    plan = ps.plan_shrink(model, x)
    ps.shrink(model, x)
    torch.testing.assert_close(call(model), want)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    assert not ps.is_sparse(model)  # no part of a unit is left
    ps.unshrink(model, plan)
    torch.testing.assert_close(call(model), want)
    assert sum(p.numel() for p in model.parameters()) == before


def test_gates_close_both_parts():
    model, x = built("complex")
    units = ps.coupled(model, x)
    ps.sparsify(model, {units.reaches: ps.Gate(ps.gates.hard_concrete, pattern=units)})
    (logits,) = {m.logits for m in model.modules() if isinstance(m, ps.SoftMask)}
    logits.data[::3] = -5
    masked = copy.deepcopy(ps.binarize(model))
    ps.shrink(model, x)
    assert_same(model, masked, x, numbers(5))
    assert not ps.is_sparse(model)


def test_targets_have_the_joint_names_of_pairs():
    model, x = built("complex")
    targets = ["0.weight", "1.weight.imag", "1.weight.real"]
    ps.sparsify(model, ps.coupled(model, x, targets=targets).rules(0.5))
    ps.shrink(model, x, targets=targets)
    sizes = [layer.weight["real"].shape for layer in model]
    assert sizes == [(8, 6), (8, 8), (4, 8)]


@pytest.mark.parametrize("unread", [slice(0, 8), slice(4, 12), slice(8, 16), slice(0)])
def test_a_pair_with_one_mask_loses_the_same_channels(unread):
    model, x = Apart().double(), one()
    columns = torch.ones(2, 4, 16, dtype=torch.bool)
    columns[0, :, :8], columns[1, :, unread] = False, False
    rules = dict(zip(("one.weight", "two.weight"), columns, strict=True))
    mask = torch.rand(16, 6) > 0.5
    mask[5] = False
    ps.sparsify(model, {"w": mask, **rules})
    masked = copy.deepcopy(model)
    ps.shrink(model, x)
    assert model.w_re.shape == model.w_im.shape == ps.mask_of(model, "w").shape
    assert_same(model, masked, x, one(5))


def test_parts_that_lost_other_channels_get_masks_of_their_own_again():
    model, x = Apart().double(), one()
    real, imaginary = torch.ones(2, 16, 6, dtype=torch.bool)
    real[:4], imaginary[8:14] = False, False
    ps.sparsify(model, {"w_re": real, "w_im": imaginary}, pairs=False)
    masked, plan = copy.deepcopy(model), ps.plan_shrink(model, x)
    ps.shrink(model, x)
    assert (len(model.w_re), len(model.w_im)) == (12, 10)
    assert_same(ps.unshrink(model, plan), masked, x)
    assert torch.equal(ps.mask_of(model, "w_re"), real)
    assert torch.equal(ps.mask_of(model, "w_im"), imaginary)
