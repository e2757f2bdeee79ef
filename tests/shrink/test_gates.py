"""Gates on the units of `coupled`: what they close leaves the network."""

import copy
import pickle

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import Attention, Residual, assert_same


def squared(logits):
    """A gate of a user's own."""
    return logits.clamp(0, 1) ** 2


GATES = {
    "sigmoid": ps.gates.sigmoid,
    "hard concrete": ps.gates.hard_concrete,
    "straight through": ps.gates.straight_through,
    "function": squared,
}


class Normed(nn.Module):
    """Convolutions with BatchNorm, a residual sum, groups and a flat linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 6, 3, padding=1, groups=2), nn.Conv2d(6, 8, 1)
        self.inner = nn.BatchNorm2d(6)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.two(self.inner(self.one(x)).relu())
        return self.head(x.flatten(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(),
                                  nn.Linear(7, 3)), (6,)),
    "residual": (Residual, (3, 4, 4)),
    "batchnorm": (Normed, (3, 4, 4)),
    "attention": (Attention, (5, 8)),
}  # fmt: skip


def gated(name, gate, init=None):
    """A model with gates, its units, and inputs."""
    torch.manual_seed(1)
    build, shape = MODELS[name]
    model, x = build().double(), torch.randn(4, *shape).double()
    units = ps.coupled(model, x)
    share = 0.0 if gate is ps.gates.straight_through else None
    rule = ps.Gate(gate, pattern=units, sparsity=share, init=init)
    return ps.sparsify(model, {units.reaches: rule}), units, x


def soft_masks(model):
    return [module for module in model.modules() if isinstance(module, ps.SoftMask)]


def close_some(model):
    """Close two gates of five, and return which."""
    masks = soft_masks(model)
    logits = masks[0].logits
    with torch.no_grad():
        logits.copy_(torch.where(torch.arange(len(logits)) % 5 < 2, -3.0, 0.6))
        logits.add_(torch.rand_like(logits) / 10)
    for mask in masks:
        if "sparsity" in mask._buffers:
            mask.sparsity.fill_(float((logits < 0).double().mean()))
        mask.hard = mask.gate is ps.gates.sigmoid  # the others close without
    return logits < 0


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("name", MODELS)
def test_units_whose_gates_are_closed_leave_the_network(name, gate):
    model, units, x = gated(name, gate)
    closed = close_some(model)
    assert 0 < closed.sum() < len(closed)
    model.eval()
    soft, others = copy.deepcopy(model), torch.randn_like(x)
    ps.binarize(model)
    masks = {n: ps.mask_of(model, n) for n, _ in ps.named_masks(model)}
    assert units.counted(masks) == (int(closed.sum()), len(closed))
    assert_same(model, soft, x, others)
    before = sum(p.numel() for p in model.parameters())
    ps.shrink(model, x)
    assert sum(p.numel() for p in model.parameters()) < before
    assert not list(ps.named_masks(model))  # no part of a unit is left
    assert_same(model, soft, x, others)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_all_tensors_of_a_unit_train_its_logit(gate):
    model, _, x = gated("batchnorm", gate, init=0.5)
    (logits,) = {mask.logits for mask in soft_masks(model)}
    assert [n for n, _ in model.named_parameters() if n.endswith("logits")] == [
        "stem.parametrizations.weight.0.logits"
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (model(x).square().mean() + 1e-3 * ps.penalty(model)).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.count_nonzero() > len(logits) // 2
    before = logits.detach().clone()
    optimizer.step()
    assert not torch.equal(logits, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (same,) = {mask.logits for mask in soft_masks(other)}
        assert torch.equal(same, logits)


def test_folding_some_tensors_leaves_the_gates_of_the_others():
    model, _, x = gated("mlp", ps.gates.sigmoid)
    close_some(model)
    whole = copy.deepcopy(model)
    ps.squash(whole)
    for name in list(dict(ps.named_masks(model))):
        ps.binarize(model, [name])
        assert_same(model, whole, x)
    other, _, x = gated("mlp", ps.gates.sigmoid)
    close_some(other)
    ps.squash(other, [next(iter(dict(ps.named_masks(other))))])
    assert_same(other, whole, x)


def test_rounds_of_continuous_sparsification_move_each_logit_once():
    torch.manual_seed(0)
    model, x = MODELS["mlp"][0](), torch.randn(4, 6)
    units = ps.coupled(model, x)
    rules = {units.reaches: ps.Gate(pattern=units, init=0.5)}
    controller = ps.ContinuousSparsification(model, rules, final_temperature=200.0, steps=3)
    (logits,) = controller.mask_parameters()
    with torch.no_grad():
        logits.copy_(torch.linspace(-1, 0.1, len(logits)))
    want = (3.0 * logits.detach()).clamp(max=0.5)
    controller.prune(3.0)
    torch.testing.assert_close(logits.detach(), want)


def test_gates_that_do_not_multiply_and_other_tensors_are_refused():
    model, x = MODELS["mlp"][0](), torch.randn(4, 6)
    units = ps.coupled(model, x)
    for gate in (ps.gates.soft_threshold, ps.gates.variational_dropout):
        with pytest.raises(ValueError, match="must multiply by a mask with the pattern `coupled`"):
            ps.sparsify(model, {units.reaches: ps.Gate(gate, pattern=units)})
    with pytest.raises(ValueError, match="must reach the tensors of its units"):
        ps.sparsify(model, {"0": ps.Gate(pattern=units)})
    assert not ps.is_sparse(model)
