"""A gate on a pair of real tensors is the gate of the complex weight that they are."""

import copy
import pickle

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse import gates
from tests.helpers.cases import DictLinear, PairLinear
from tests.helpers.machine import need_inductor

KINDS = {
    "sigmoid": ps.Gate(init=0.2),
    "hard_concrete": ps.Gate(gates.hard_concrete, init=0.0),
    "straight_through": ps.Gate(gates.straight_through, sparsity=0.5),
    "soft_threshold": ps.Gate(gates.soft_threshold, init=-0.5),
    "variational_dropout": ps.Gate(gates.variational_dropout, init=0.0),
    "rows": ps.Gate(gates.hard_concrete, init=0.0, pattern=ps.patterns.channel(0)),
}
all_kinds = pytest.mark.parametrize("kind", KINDS)


class Native(nn.Module):
    """What PairLinear is, with a complex Parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.cdouble))

    def forward(self, x):
        return torch.cat([x @ self.weight.real.T, x @ self.weight.imag.T], -1)


def both(kind):
    """A pair and its oracle, with the same weights and the same logits, which differ."""
    torch.manual_seed(0)
    native, pair = Native(), PairLinear().double()
    with torch.no_grad():
        pair.weight_re.copy_(native.weight.real)
        pair.weight_im.copy_(native.weight.imag)
    for model in (native, pair):
        ps.sparsify(model, KINDS[kind])
    with torch.no_grad():
        logits = gate_of(native).logits
        gate_of(pair).logits.copy_(logits.add_(torch.randn_like(logits)))
    return native, pair


def gate_of(model):
    return next(module for module in model.modules() if isinstance(module, ps.SoftMask))


def weight_of(model):
    return torch.complex(model.weight_re, model.weight_im)


@all_kinds
def test_a_pair_reads_and_learns_as_the_complex_weight_does(kind):
    native, pair = both(kind)
    x = torch.randn(3, 6).double()
    for model in (native.eval(), pair.eval()):
        (model(x).square().sum() + ps.penalty(model)).backward()
    torch.testing.assert_close(pair(x), native(x))
    torch.testing.assert_close(gate_of(pair).logits.grad, gate_of(native).logits.grad)
    stored = pair.parametrizations
    grad = torch.complex(stored.weight_re.original.grad, stored.weight_im.original.grad)
    torch.testing.assert_close(grad, native.parametrizations.weight.original.grad)
    assert torch.equal(*(dict(ps.named_masks(m))["weight"] for m in (native, pair)))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("verb", [ps.binarize, ps.squash])
@all_kinds
def test_folded_a_pair_is_what_the_folded_complex_weight_is(kind, verb, hard):
    native, pair = both(kind)
    for model in (native, pair):
        gate_of(model).hard = hard
        verb(model)
    torch.testing.assert_close(weight_of(pair), native.weight, rtol=0, atol=1e-15)
    assert {type(stack) for stack in getattr(pair, "parametrizations", {}).values()} <= {
        type(ps.sparsify(nn.Linear(2, 2), 0.5).parametrizations.weight)
    }


def test_both_parts_are_open_as_often_and_nothing_of_a_reading_stays():
    _, pair = both("hard_concrete")
    with torch.no_grad():
        gate_of(pair).logits.fill_(0.0)
        read = torch.stack([weight_of(pair) for _ in range(1000)])
    closed = 1 - gates.hard_concrete_penalty(torch.zeros(())).item()
    for part in (read.real, read.imag):
        assert (part == 0).double().mean().item() == pytest.approx(closed, abs=0.02)
    with torch.inference_mode():
        _ = pair.weight_im
    assert not any(isinstance(v, torch.Tensor) for v in vars(pair.parametrizations.weight_re))
    pair(torch.randn(2, 6).double()).sum().backward()
    assert gate_of(pair).logits.grad.any()


class Mixed(nn.Module):
    """Reads the real part twice, then the imaginary one twice, as complex products do."""

    def __init__(self):
        super().__init__()
        self.weight_re = nn.Parameter(torch.randn(4, 6))
        self.weight_im = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        re, im = self.weight_re, self.weight_re
        re2, im2 = self.weight_im, self.weight_im
        return (x @ re.T - x @ re2.T).square() + (x @ im2.T + x @ im.T).square()


@all_kinds
def test_checkpointing_has_the_gradients_of_the_forward(kind):
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = ps.sparsify(Mixed(), KINDS[kind])
        _ = model.weight_im
        x = torch.randn(3, 6)
        torch.manual_seed(1)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            out = model(x)
        out.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


class TiedApart(nn.Module):
    """A pair, one part of which is a Linear's as well, and another pair of the same tensors."""

    def __init__(self, first):
        super().__init__()
        linear = nn.Linear(6, 4, bias=False)
        if first:
            self.linear = linear
        self.a = PairLinear()
        self.linear = linear
        self.linear.weight = self.a.weight_im
        self.b = PairLinear()
        self.b.weight_re, self.b.weight_im = self.a.weight_re, self.a.weight_im

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), self.linear(x)], -1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("verb", [ps.binarize, ps.squash])
@all_kinds
def test_parts_that_are_tied_elsewhere_read_the_same_everywhere(kind, verb, hard, first):
    model = ps.sparsify(TiedApart(first), {"*": KINDS[kind]}).eval()
    gate_of(model).hard = hard
    gate = gate_of(model)
    with torch.no_grad():
        gate.logits.add_(torch.randn_like(gate.logits))
    assert sum(isinstance(m, ps.SoftMask) for m in model.modules()) == 1

    def check():
        assert torch.equal(model.a.weight_im, model.b.weight_im)
        assert torch.equal(model.a.weight_im, model.linear.weight)
        assert torch.equal(model.a.weight_re, model.b.weight_re)

    check()
    want = model(x := torch.randn(3, 6))
    verb(model)
    check()
    if hard or kind not in ("sigmoid", "variational_dropout") or verb is ps.squash:
        torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("kind", ["soft_threshold", "variational_dropout", "hard_concrete"])
def test_fx_traces_pairs(kind):
    _, pair = both(kind)
    x = torch.randn(3, 6).double()
    traced = torch.fx.symbolic_trace(pair.eval())
    torch.testing.assert_close(traced(x), pair(x))


def test_noise_of_variational_dropout_has_the_variance_that_the_complex_one_has():
    pair = ps.sparsify(PairLinear().double(), KINDS["variational_dropout"])
    with torch.no_grad():
        noise = torch.stack([weight_of(pair) - ps.stored(pair, "weight") for _ in range(2000)])
    assert noise.abs().square().mean().item() == pytest.approx(1.0, abs=0.02)
    assert (noise.real * noise.imag).mean().item() == pytest.approx(0.0, abs=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")  # inductor's, about complex numbers
@all_kinds
def test_it_is_copied_pickled_compiled_exported_and_resumed(kind):
    _, pair = both(kind)
    pair.eval()
    x = torch.randn(3, 6).double()
    want = pair(x)
    copied = copy.deepcopy(pair)
    assert torch.equal(copied(x), want)
    with torch.no_grad():
        copied.parametrizations.weight_im.original.zero_()
    assert torch.equal(pair(x), want)  # no part of the copy is one of the model's
    assert torch.equal(pickle.loads(pickle.dumps(pair))(x), want)
    fresh = ps.sparsify(PairLinear().double(), KINDS[kind]).eval()
    fresh.load_state_dict(pair.state_dict())
    assert torch.equal(fresh(x), want)
    compiled = torch.compile(pair, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.export.export(pair, (x,)).module()(x), want)
    pair.train()
    compiled = torch.compile(pair, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert gate_of(pair).logits.grad.any()


@pytest.mark.filterwarnings("ignore::UserWarning")  # inductor's, about complex numbers
@all_kinds
def test_inductor_compiles_it(kind):
    need_inductor()
    _, pair = both(kind)
    pair.eval()
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(torch.compile(pair, fullgraph=True)(x), pair(x))


@all_kinds
def test_a_part_can_be_assigned_and_the_other_stays(kind):
    _, pair = both(kind)
    pair.eval()
    value, other = torch.randn(4, 6).double(), pair.weight_re.detach().clone()
    open_ = pair.weight_im.detach() != 0
    pair.weight_im = value
    torch.testing.assert_close(pair.weight_re.detach(), other)
    torch.testing.assert_close(pair.weight_im.detach()[open_], value[open_])
    with pytest.raises(ValueError, match="must keep its shape"):
        pair.weight_im = value[:2]
    with pytest.raises(RuntimeError, match="cannot be tied"):
        pair.weight_im = nn.Parameter(value)


@all_kinds
def test_functional_call_leaves_it_as_it_was(kind):
    _, pair = both(kind)
    pair.eval()
    before = copy.deepcopy(pair.state_dict())
    new = {"parametrizations.weight_re.original": torch.zeros(4, 6).double()}
    torch.func.functional_call(pair, new, (torch.randn(3, 6).double(),))
    for key, value in pair.state_dict().items():
        assert torch.equal(value, before[key])


@all_kinds
def test_half_precision_and_parameter_dicts(kind):
    model = ps.sparsify(DictLinear().to(torch.bfloat16), KINDS[kind])
    out = model(torch.randn(3, 6).to(torch.bfloat16))
    (out.float().square().sum() + ps.penalty(model).float()).backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert out.dtype == torch.bfloat16
    assert gate_of(model).logits.grad.any()
    assert {p.dtype for p in ps.squash(model).parameters()} == {torch.bfloat16}


@all_kinds
def test_taken_off_both_parts_are_as_before(kind):
    native, pair = both(kind)
    stored = ps.stored(native, "weight")
    ps.unsparsify(pair)
    assert type(pair) is PairLinear
    torch.testing.assert_close(weight_of(pair), stored)
    masked = ps.sparsify(pair, 0.5)
    assert int((masked.weight_re != 0).sum()) == 12


def test_under_another_parametrization_both_parts_are_seen():
    torch.manual_seed(0)
    pair = PairLinear().double()
    for name in ("weight_re", "weight_im"):
        nn.utils.parametrizations.weight_norm(pair, name)
    plain = torch.complex(pair.weight_re, pair.weight_im).detach()
    ps.sparsify(pair, KINDS["soft_threshold"])
    want = gates.soft_threshold(plain, torch.tensor(-0.5).double())
    torch.testing.assert_close(weight_of(pair).detach(), want)
    other = ps.unsparsify(copy.deepcopy(pair))
    torch.testing.assert_close(weight_of(other).detach(), plain)
    assert not any("parts" in vars(stack) for stack in other.parametrizations.values())
    torch.testing.assert_close(weight_of(ps.squash(pair)).detach(), want)
