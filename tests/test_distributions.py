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
from parasparse.distributions import erdos_renyi, erk, uniform

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
