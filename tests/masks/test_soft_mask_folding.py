"""Gates made hard, folded, assigned to: what stays of them in the weight."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse import gates
from tests.helpers.gated import DRAWS, GATES, all_gates, gated, mask_of


@all_gates
def test_binarize_and_squash_give_what_evaluation_gives(name):
    model = gated(name)
    if name in ("sigmoid", "channels", "variational_dropout"):
        mask_of(model).hard = True  # soft, these are not what they are pruned to
    x = torch.randn(3, 6).double()
    squashed = ps.squash(copy.deepcopy(model))  # in training mode: without noise
    binarized = ps.binarize(copy.deepcopy(model))
    want = model.eval()(x)
    assert type(squashed) is nn.Linear
    torch.testing.assert_close(squashed.eval()(x), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(binarized.eval()(x), want, rtol=0, atol=1e-12)
    mask = ps.mask_of(binarized, "weight")
    assert mask.dtype == torch.bool
    assert not binarized.weight[~mask].any()
    assert [n for n, _ in binarized.named_parameters()] == [
        "bias", "parametrizations.weight.original",
    ]  # fmt: skip
    for network in (binarized, ps.squash(copy.deepcopy(binarized))):
        program = torch.export.export(network.eval(), (x,))
        torch.testing.assert_close(program.module()(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("threshold", "limit"), [(None, 3.0), (0.0, 0.0), (-2.0, -2.0)])
@pytest.mark.parametrize("dtype", [torch.double, torch.cdouble])
def test_relevance_is_thresholded(threshold, limit, dtype):
    model = gated("variational_dropout", dtype)
    with torch.no_grad():
        mask_of(model).logits.normal_(0, 3)
    weight = ps.stored(model, "weight").detach().clone()
    relevance = mask_of(model).logits.detach() - 2 * weight.abs().log()
    ps.binarize(model, threshold=threshold)
    assert ps.mask_of(model, "weight").equal(relevance <= limit)
    assert torch.equal(ps.stored(model, "weight"), weight)


def test_thresholds_of_the_others():
    model = gated("straight_through")
    scores = mask_of(model).logits.detach().clone()
    ps.binarize(model, threshold=0.3)
    assert ps.mask_of(model, "weight").equal(scores > 0.3)
    model = gated("hard_concrete")
    open_ = mask_of(model).mask.detach() > 0.6
    ps.binarize(model, threshold=0.6)
    assert ps.mask_of(model, "weight").equal(open_)


def test_assigning_reads_back_in_evaluation():
    for name in GATES:
        model = gated(name).eval()
        value = torch.where(model.weight != 0, torch.randn(4, 6).double(), 0.0).detach()
        model.weight = value
        torch.testing.assert_close(model.weight.detach(), value)


def test_zero_can_be_assigned_to_an_open_entry():
    model = ps.sparsify(nn.Linear(30, 20), ps.Gate(gates.soft_threshold, init=-3.0)).eval()
    value = model.weight.detach() * (torch.rand(20, 30) < 0.5)
    model.weight = value
    torch.testing.assert_close(model.weight.detach(), value)
    model = ps.sparsify(nn.Linear(30, 20), ps.Gate(gates.variational_dropout, init=-6.0)).eval()
    mask_of(model).hard = True
    model.weight = torch.zeros(20, 30)
    assert not model.weight.any()


def test_a_threshold_must_be_finite_and_weights_writable():
    model = gated("sigmoid")
    with pytest.raises(ValueError, match="`threshold` must be a finite number; got nan"):
        ps.binarize(model, threshold=float("nan"))
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two[1].weight = nn.Parameter(torch.ones(1).expand(3, 3))
    ps.sparsify(two, ps.Gate(init=1.0))
    with pytest.raises(RuntimeError, match='`binarize` cannot write to "1.weight"'):
        ps.binarize(two)
    assert all(isinstance(m, ps.SoftMask) for m in two.modules() if "Mask(" in repr(m)[:9])


def test_a_gate_all_but_closed_stores_no_infinity():
    model = ps.sparsify(nn.Linear(3, 2), ps.Gate())
    mask_of(model).logits.data.fill_(-1.0)
    mask_of(model).temperature.fill_(88.0)  # a mask of 1e-38
    kept = ps.stored(model, "weight").clone()
    model.weight = torch.full((2, 3), 100.0)
    assert torch.equal(ps.stored(model, "weight"), kept)


@all_gates
@pytest.mark.parametrize("verb", [ps.binarize, ps.squash])
@pytest.mark.parametrize("hard", [True, False])
def test_folding_a_part_scales_a_tie_that_lies_outside_once(name, verb, hard):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4)).double()
    model[1].weight = model[0].weight
    ps.sparsify(model, GATES[name]).eval()
    gate = model[0].parametrizations.weight[-1]
    gate.hard = hard
    with torch.no_grad():
        gate.logits.add_(torch.randn_like(gate.logits))
    want = model[1].weight.detach().clone()
    verb(model[0])
    if hard or name not in ("sigmoid", "channels", "variational_dropout") or verb is ps.squash:
        torch.testing.assert_close(model[1].weight.detach(), want)
        torch.testing.assert_close(model[0].weight.detach(), want)
    if name != "variational_dropout":
        torch.testing.assert_close(model[1].train().weight, model[0].weight)


@all_gates
def test_functional_call_leaves_the_stored_weight_as_it_was(name):
    model = gated(name)
    before = ps.stored(model, "weight").detach().clone()
    x, new = torch.randn(3, 6).double(), torch.randn(4, 6).double()
    adds = name in ("soft_threshold", "variational_dropout", "rows")
    for training in (True, False):
        model.train(training)
        if adds or (training and name in DRAWS):
            with pytest.raises(RuntimeError, match="must not swap a tensor under a gate"):
                torch.func.functional_call(model, {"weight": new}, (x,))
            assert torch.equal(ps.stored(model, "weight"), before)
    if adds:
        return
    torch.func.functional_call(model, {"weight": new}, (x,))
    torch.testing.assert_close(ps.stored(model, "weight").detach(), before)
