"""`coupled(...).rules`: from units to the rules of `sparsify`."""

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import built

MODELS = ("flatten", "residual", "attention")


def last_first(tensor, name):
    return -torch.arange(tensor.numel()).view(tensor.shape).double()


@pytest.mark.parametrize("options", [{}, {"score": last_first}], ids=["magnitude", "score"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_rules_are_those_written_by_hand(name, sparsity, options):
    model, example, _ = built(name)
    units = ps.coupled(model, example)
    rule = ps.Prune(sparsity, pattern=units, scope="global", **options)
    assert units.rules(sparsity, **options) == {units.reaches: rule}
    ps.sparsify(model, units.rules(sparsity, **options))
    dropped, number = units.counted({n: ps.mask_of(model, n) for n in units._shapes})
    assert sparsity < 1 or dropped < number  # one of each group stays
    assert sparsity > 0 or dropped == 0
    assert sparsity == 1 or abs(dropped / number - sparsity) < 0.15


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_a_sparsity_that_is_none_is_refused(sparsity):
    model, example, _ = built("flatten")
    with pytest.raises((TypeError, ValueError), match="`sparsity` must"):
        ps.coupled(model, example).rules(sparsity)


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.after(self.before(x).softmax(-1))


class Entangled(nn.Module):
    """Each head depends on all of its channels, and each channel on all heads."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 12), nn.Linear(12, 4)
        self.heads, self.width = 4, 3

    def forward(self, x):
        h = self.before(x).unflatten(-1, (self.heads, self.width))
        return self.after((h.softmax(-1) * h.softmax(-2)).flatten(-2))


WITHOUT_UNITS = {
    "outputs alone": (nn.Linear(4, 8), {}, "an output of the model"),
    "a norm": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)), {}, "1 takes a"),
    "a softmax": (Softmax(), {}, "_softmax over channels"),
    "all in one": (Entangled(), {}, r"all of before.\w+ belongs together"),
    "other targets": (
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), {"targets": "1.weight"},
        "no target reaches 0.weight",
    ),
    "no weights": (nn.ReLU(), {}, "it has no weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_UNITS)
def test_without_units_the_error_says_why(name):
    model, options, reason = WITHOUT_UNITS[name]
    units = ps.coupled(model, torch.randn(1, 4), **options)
    with pytest.raises(ValueError, match=f"no channel of the model can be removed: .*{reason}"):
        units.rules(0.5)
