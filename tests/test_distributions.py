"""Distributions share out a budget to the single entry."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import parasparse as ps
from parasparse.counts import num_kept
from parasparse.distributions import erdos_renyi, erk, linear_in_depth, owl, uniform

ALL = pytest.mark.parametrize("distribution", [uniform, erdos_renyi, erk], ids=lambda f: f.__name__)
RATIO = {
    uniform: lambda shape: Fraction(1),
    erdos_renyi: lambda shape: (
        Fraction(shape[0] + shape[1], shape[0] * shape[1]) if len(shape) > 1 else Fraction(1)
    ),
    erk: lambda shape: Fraction(sum(shape), math.prod(shape)) if shape else Fraction(1),
}
shape_dicts = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.lists(st.integers(0, 40), max_size=4).map(tuple),
    min_size=1,
)
shares = st.floats(0, 1)


def counts(shapes, sparsities):
    return {name: num_kept(math.prod(shapes[name]), s) for name, s in sparsities.items()}


@ALL
@given(shape_dicts, shares, shares)
def test_the_total_is_exact_and_every_tensor_is_within_its_bounds(
    distribution, shapes, sparsity, floor
):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = num_kept(sum(sizes.values()), sparsity)
    # Below 1, even a tensor of a single entry keeps one.
    least = int(floor < 1)
    floors = {n: max(num_kept(size, floor), min(size, least)) for n, size in sizes.items()}
    assume(sum(floors.values()) <= total)
    found = distribution(shapes, sparsity, max_sparsity=floor)
    assert list(found) == list(shapes)
    assert all(0 <= s <= 1 for s in found.values())
    kept = counts(shapes, found)
    assert sum(kept.values()) == total
    assert all(floors[name] <= kept[name] <= sizes[name] for name in sizes)


@ALL
@given(shape_dicts, shares)
def test_tensors_between_their_bounds_keep_shares_in_the_papers_proportion(
    distribution, shapes, sparsity
):
    kept = counts(shapes, distribution(shapes, sparsity))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    weights = {n: sizes[n] * RATIO[distribution](shapes[n]) for n in sizes if sizes[n]}
    # Rounding moves each by less than one entry, so that kept = scale * weight gives a range.
    free = [name for name in sizes if 0 < kept[name] < sizes[name]]
    scale_from = [(kept[name] - 1) / weights[name] for name in free]
    scale_to = [(kept[name] + 1) / weights[name] for name in free]
    if free:
        assert max(scale_from) < min(scale_to)
        full = [name for name in sizes if 0 < sizes[name] == kept[name]]
        assert all((sizes[name] - 1) / weights[name] < min(scale_to) for name in full)


@ALL
@given(shape_dicts, shares, shares)
def test_the_sparser_the_whole_the_sparser_each_tensor(distribution, shapes, one, two):
    low, high = sorted((one, two))
    denser, sparser = (counts(shapes, distribution(shapes, s)) for s in (low, high))
    # Rounding may give a single entry to another tensor.
    assert all(sparser[name] <= denser[name] + 1 for name in shapes)


@pytest.mark.parametrize("distribution", [erdos_renyi, erk])
def test_large_models_lose_no_entry_to_rounding(distribution):
    shapes = {f"layer{i}": (8192 + i, 28672 - i) for i in range(80)} | {"head": (128256, 8192)}
    found = distribution(shapes, 0.97)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert sum(counts(shapes, found).values()) == num_kept(total, 0.97)


def test_erk_is_the_formula_of_rigl_where_nothing_is_full():
    shapes = {"a": (64, 32, 3, 3), "b": (128, 64, 3, 3), "c": (256, 128, 1, 1)}
    found = erk(shapes, 0.9)
    n = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / n[name] for name, shape in shapes.items()}
    scale = 0.1 * sum(n.values()) / sum(raw[name] * n[name] for name in n)
    for name in shapes:
        assert 1 - found[name] == pytest.approx(scale * raw[name], abs=1 / n[name])


def test_a_full_tensors_surplus_goes_to_the_others_and_floors_hold():
    shapes = {"large": (100, 100), "small": (2, 2), "held": (50, 50)}
    found = erk(shapes, 0.8, max_sparsity={"held": 0.5})
    assert found["small"] == 0
    assert found["held"] == 0.5
    assert sum(counts(shapes, found).values()) == num_kept(12504, 0.8)


def test_a_rule_keeps_the_budget_to_the_single_weight():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 33, 3), torch.nn.Linear(33, 7)
    )
    rule = ps.Prune(0.87, distribution=partial(erk, max_sparsity=0.95))
    ps.sparsify(model, rule)
    table = ps.summary(model).masked
    assert table.kept == num_kept(table.numel, 0.87)


BAD = {
    "floors_forbid": (lambda: erk({"a": (4, 4)}, 0.9, max_sparsity=0.5), "keeps 8 of 16"),
    "floor_of_one_forbids": (
        lambda: erk({"a": (4, 4), "b": (4, 4)}, 0.9, max_sparsity={"a": 0.5}),
        "keeps 8 of 32, and a sparsity of 0.9 keeps 3. Raise .*, or lower `sparsity`.$",
    ),
    "unknown_name": (
        lambda: uniform({"a": (4,)}, 0.5, max_sparsity={"b": 0.5}),
        '"a"; got "b"',
    ),
    "sparsity": (lambda: uniform({"a": (4,)}, 1.5), r"`sparsity` must be in \[0, 1\]"),
    "floor": (lambda: uniform({"a": (4,)}, 0.5, max_sparsity=-1), "`max_sparsity` must be in"),
    "named_floor": (
        lambda: uniform({"a": (4,)}, 0.5, max_sparsity={"a": 2}),
        "`max_sparsity of a` must be in",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_shared_out_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@ALL
def test_empty_tensors_scalars_and_no_tensors_at_all_are_shared_out_too(distribution):
    assert distribution({}, 0.5) == {}
    assert distribution({"none": (0, 3), "one": ()}, 0.0) == {"none": 0.0, "one": 0.0}
    assert distribution({"none": (0, 3), "one": ()}, 1.0) == {"none": 0.0, "one": 1.0}


class Inputs:
    """What `owl` reads: weights and the norms of their inputs."""

    def __init__(self, weights, norms):
        self.stored, self.input_norm = weights.__getitem__, norms.__getitem__


layers = st.dictionaries(
    st.sampled_from(
        ["layers.0.a", "layers.0.b", "layers.1.a", "layers.2.a", "layers.10.a", "head"]
    ),
    st.lists(st.integers(1, 20), min_size=1, max_size=2).map(tuple),
    min_size=1,
)


@given(layers, shares, st.floats(-0.3, 0.3), st.floats(0, 0.5), st.integers(0, 9))
def test_totals_by_depth_and_by_outliers_are_exact(shapes, sparsity, step, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(shape, generator=generator) ** 3 for n, shape in shapes.items()}
    statistics = Inputs(weights, dict.fromkeys(shapes, torch.tensor(2.0)))
    total = num_kept(sum(map(math.prod, shapes.values())), sparsity)
    for distribution in (linear_in_depth(step), owl(statistics, threshold=2, spread=spread)):
        found = distribution(shapes, sparsity)
        assert list(found) == list(shapes)
        assert all(0 <= share <= 1 for share in found.values())
        assert sum(counts(shapes, found).values()) == total


def test_sparsity_rises_linearly_from_block_to_block():
    shapes = {f"layers.{i}.{part}": (100, 100) for i in range(11) for part in "ab"}
    found = linear_in_depth(0.02)(shapes, 0.7)
    assert found["layers.10.a"] == found["layers.10.b"]
    assert [round(found[f"layers.{i}.a"], 3) for i in (0, 5, 10)] == [0.6, 0.7, 0.8]
    assert linear_in_depth(0.0)(shapes, 0.7) == uniform(shapes, 0.7)


def test_blocks_with_more_outliers_are_denser_by_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.w": torch.randn(60, 60, generator=generator) for i in range(4)}
    norms = {name: torch.ones(60) for name in weights}
    for number, name in enumerate(weights):
        norms[name][: 3 * number] = 30.0  # inputs with large features
    shapes = {name: weight.shape for name, weight in weights.items()}
    found = owl(Inputs(weights, norms), threshold=3, spread=0.08)(shapes, 0.7)
    ratios = torch.tensor(
        [
            float(((w.abs() * norms[n]) > 3 * (w.abs() * norms[n]).mean()).double().mean())
            for n, w in weights.items()
        ],
        dtype=torch.float64,
    )
    scaled = (ratios - ratios.min()) * (2 * 0.08 / (ratios.max() - ratios.min()))
    expected = 1 - (scaled - scaled.mean() + 0.3)
    torch.testing.assert_close(
        torch.tensor(list(found.values()), dtype=torch.float64), expected, rtol=0, atol=1 / 3600
    )
