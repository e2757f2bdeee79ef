"""`coupled(...).rules`: from units to the rules of `sparsify`."""

from itertools import pairwise

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


class MultiQuery(nn.Module):
    """All heads share a key and a value, of the width 3 that the program states."""

    def __init__(self):
        super().__init__()
        self.queries, self.both = nn.Linear(4, 6), nn.Linear(4, 6)
        self.after = nn.Linear(6, 4)

    def forward(self, x):
        queries = self.queries(x).view(len(x), 2, 3).transpose(0, 1)
        keys, values = self.both(x).chunk(2, -1)
        weights = (queries @ keys.t()).softmax(-1)
        return self.after((weights @ values).transpose(0, 1).flatten(1))


WITHOUT_UNITS = {
    "outputs alone": (nn.Linear(4, 8), {}, "an output of the model"),
    "a norm": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)), {}, '"1" takes a'),
    "a softmax": (Softmax(), {}, "_softmax over channels"),
    "all in one": (Entangled(), {}, r"all of before.\w+ belongs together"),
    "values as wide as keys": (MultiQuery(), {}, "all units use it"),
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


def mlp():
    torch.manual_seed(0)
    sizes = (6, 20, 30, 10)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()


def shares_dropped(model, units):
    """By name of a layer, the share of rows that its mask drops."""
    masks = {name: ps.mask_of(model, name) for name in units._shapes}
    return {n: float((~m.any(1)).double().mean()) for n, m in masks.items() if m.ndim == 2}


def by_hand(shapes, sparsity):
    return {name: 0.25 if name == "0.weight" else sparsity for name in shapes}


DISTRIBUTIONS = {
    "uniform": ps.distributions.uniform,
    "erk": ps.distributions.erk,
    "in depth": ps.distributions.linear_in_depth(0.2),
    "by hand": by_hand,
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_distribution_says_what_each_layer_loses(distribution):
    model, x = mlp(), torch.randn(2, 6).double()
    shapes = {name: model.get_parameter(name).shape for name in ("0.weight", "2.weight")}
    units = ps.coupled(model, x, distribution=distribution)
    ps.sparsify(model, units.rules(0.5))
    dropped = shares_dropped(model, units)
    for name, share in distribution(shapes, 0.5).items():
        assert abs(dropped[name] - share) <= 0.51 / shapes[name][0]
    masked = model(x)
    torch.testing.assert_close(ps.shrink(model, x)(x), masked, rtol=1e-10, atol=1e-12)


def test_the_channels_of_a_residual_stream_belong_to_the_layer_that_starts_it():
    model, example, _ = built("residual")
    dense = {name: parameter.shape for name, parameter in model.named_parameters()}
    seen = []

    def watched(shapes, sparsity):
        seen.append(dict(shapes))
        return dict.fromkeys(shapes, sparsity)

    units = ps.coupled(model, example, distribution=watched)
    ps.sparsify(model, units.rules(0.5))
    (shapes,) = seen
    assert shapes == {name: dense[name] for name in ("stem.weight", "one.weight")}


@pytest.mark.parametrize("name", MODELS)
def test_a_distribution_of_one_sparsity_changes_nothing(name):
    masks = []
    for options in ({}, {"distribution": lambda shapes, sparsity: dict.fromkeys(shapes, sparsity)}):
        model, example, _ = built(name)
        ps.sparsify(model, ps.coupled(model, example, **options).rules(0.4))
        masks.append(dict(ps.named_masks(model)))
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())


BAD_DISTRIBUTIONS = {
    "no mapping": (
        lambda shapes, sparsity: sparsity,
        "must return a sparsity for each of .0.weight",
    ),
    "other names": (lambda shapes, sparsity: {"0": 0.5}, "must return a sparsity for each of"),
    "too much": (lambda shapes, sparsity: dict.fromkeys(shapes, 2), "sparsity of 0.weight"),
}


@pytest.mark.parametrize("name", BAD_DISTRIBUTIONS)
def test_a_distribution_that_gives_no_sparsities_is_refused(name):
    distribution, message = BAD_DISTRIBUTIONS[name]
    model, x = mlp(), torch.randn(2, 6).double()
    with pytest.raises(ValueError, match=message):
        ps.sparsify(model, ps.coupled(model, x, distribution=distribution).rules(0.5))
    assert not dict(ps.named_masks(model))


def test_a_distribution_ranks_no_units_of_all_layers_together():
    with pytest.raises(ValueError, match="`uniform` must be True with a `distribution`"):
        ps.coupled(mlp(), torch.randn(2, 6).double(), uniform=False, distribution=by_hand)


MISUSES = {
    "a pattern as rules": (
        lambda model, x: ps.sparsify(model, ps.coupled(model, x)),
        "units.rules",
    ),
    "a norm by name": (lambda model, x: ps.coupled(model, x, norm="l2"), "`norm` must be None"),
    "a distribution by name": (
        lambda model, x: ps.coupled(model, x, distribution="erk"),
        "`distribution` must be a callable; got 'erk'",
    ),
    "a rule for each tensor apart": (
        lambda model, x: ps.sparsify(model, {"*": ps.Prune(0.5, pattern=ps.coupled(model, x))}),
        '`scope` must be "global"',
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_are_refused_with_the_way_out(name):
    misuse, message = MISUSES[name]
    model = mlp()
    with pytest.raises((TypeError, ValueError), match=message):
        misuse(model, torch.randn(2, 6).double())
    assert not ps.is_sparse(model)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_units_of_a_wrapped_model_have_the_names_of_rules(wrapper):
    model, example, _ = built("flatten")
    wrapped = WRAPPERS[wrapper](model)
    inner = wrapped.module if wrapper == "averaged" else model  # of which it has a copy
    ps.sparsify(wrapped, ps.coupled(wrapped, example).rules(0.5))
    ps.shrink(inner, example)
    assert (inner[0].out_channels, inner[4].out_channels, inner[6].out_features) == (4, 3, 5)


def test_units_of_before_the_cut_are_refused_after_it():
    model, example, _ = built("flatten")
    units = ps.coupled(model, example)
    ps.shrink(ps.sparsify(model, units.rules(0.5)), example)
    gate = {units.reaches: ps.Gate(ps.gates.sigmoid, pattern=units)}
    for rules in (units.rules(0.5), gate):
        with pytest.raises(ValueError, match="Call `coupled` again"):
            ps.sparsify(model, rules)
    assert not ps.is_sparse(model)
