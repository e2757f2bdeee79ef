"""`max_sparsity`: the highest sparsity of one tensor, whatever the scope and the pattern."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.counts import least_kept, num_kept
from parasparse.distributions import erdos_renyi, erk, uniform
from parasparse.patterns import block, chain, channel, n_of_m, unstructured
from parasparse.patterns.ranked import number_of
from parasparse.schedules import Constant


def tensors(seed=0):
    """Return tensors of which `low` has the lowest scores and `tiny` few entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"low": (16, 12), "high": (24, 8), "tiny": (1, 3), "empty": (0, 4)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | {"low": found["low"] / 1000}


PATTERNS = {"unstructured": unstructured, "block": block((4, 4)), "channel": channel(0)}


def counts(prune, given):
    """Return how many units of each tensor `prune` keeps, and how many there are."""
    masks, pattern = prune(given), prune.pattern
    if pattern is unstructured:
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
    else:
        kept = {name: int(pattern.pool(mask.float()).sum()) for name, mask in masks.items()}
        for mask in masks.values():
            assert torch.equal(pattern.spread(pattern.pool(mask.float()) > 0, mask.shape), mask)
    return kept, {name: number_of(pattern, tensor.shape) for name, tensor in given.items()}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@given(st.floats(0.05, 0.93), st.floats(0.001, 0.999))
def test_the_total_is_what_was_asked_and_no_tensor_is_below_its_floor(pattern, sparsity, part):
    most = sparsity + part * (1 - sparsity)
    prune = ps.Prune(sparsity, pattern=pattern, scope="global", max_sparsity=most)
    sizes = {name: number_of(pattern, tensor.shape) for name, tensor in tensors().items()}
    least = {name: least_kept(size, most) for name, size in sizes.items()}
    total = num_kept(sum(sizes.values()), sparsity)
    if sum(least.values()) > total:
        with pytest.raises(ValueError, match="must not keep more"):
            prune(tensors())
        return
    kept, _ = counts(prune, tensors())
    assert sum(kept.values()) == total
    assert all(kept[name] >= least[name] for name in kept)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@given(st.floats(0.05, 0.999))
def test_alone_each_tensor_keeps_its_share_or_its_floor(pattern, sparsity):
    prune = ps.Prune(sparsity, pattern=pattern, max_sparsity=0.999)
    kept, sizes = counts(prune, tensors())
    for name, size in sizes.items():
        assert kept[name] == max(num_kept(size, sparsity), min(size, 1))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_a_floor_that_nothing_meets_changes_nothing(pattern):
    given = {name: tensor for name, tensor in tensors().items() if name == "high"}
    given["other"] = given["high"].flip(0)
    for scope in ("local", "global"):
        one = ps.Prune(0.5, pattern=pattern, scope=scope)
        two = ps.Prune(0.5, pattern=pattern, scope=scope, max_sparsity=0.95)
        assert all(torch.equal(mask, two(given)[name]) for name, mask in one(given).items())


def test_equal_scores_are_kept_by_place():
    same = {name: torch.ones(4) for name in "abc"}
    masks = ps.Prune(0.5, scope="global", max_sparsity=0.75)(same)
    assert {n: m.tolist() for n, m in masks.items()} == {
        "a": [True, True, True, True],
        "b": [True, False, False, False],
        "c": [True, False, False, False],
    }


@pytest.mark.parametrize("distribution", [uniform, erdos_renyi, erk])
def test_nothing_to_share_out_is_nothing(distribution):
    assert distribution({}, 0.5) == {}
    assert distribution({"a": (0, 3)}, 0.5, max_sparsity=0.9) == {"a": 0.0}
    assert ps.Prune(0.5, distribution=distribution)({}) == {}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("max_sparsity", [0.9, 1.0])
def test_nothing_to_rank_is_nothing(pattern, max_sparsity):
    for scope in ("local", "global"):
        prune = ps.Prune(0.5, pattern=pattern, scope=scope, max_sparsity=max_sparsity)
        assert prune({}) == {}


def custom(scores, sparsity):
    return unstructured(scores, sparsity)


REFUSED = {
    "below": (lambda: ps.Prune(0.9, max_sparsity=0.8), "must be at least `sparsity`"),
    "a number": (lambda: ps.Prune(0.9, max_sparsity=1.5), r"`max_sparsity` must be in \[0, 1\]"),
    "distribution": (lambda: ps.Prune(0.5, distribution=erk, max_sparsity=0.9), "Bind it there"),
    "n_of_m": (
        lambda: ps.Prune(pattern=n_of_m(2, 4), max_sparsity=0.9),
        "`max_sparsity` must be omitted with n_of_m",
    ),
    "custom": (lambda: ps.Prune(0.5, pattern=custom, max_sparsity=0.9), "must be omitted with"),
    "chain": (
        lambda: ps.Prune(0.5, pattern=chain(channel(0), n_of_m(2, 4)), max_sparsity=0.9),
        "must be omitted with patterns other",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_floor_does_not_go_with_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def net():
    """Return a model whose first layer has the lowest weights."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    return model


def test_controllers_keep_the_floor_too():
    rule = ps.Prune(0.9, scope="global", max_sparsity=0.98)
    for scheduled in (True, False):
        model = net()
        if scheduled:
            schedule = ps.schedules.Linear(0.0, 1.0, stop=3)
            controller = ps.GradualPruning(model, rule, schedule=schedule, every=1)
            for _ in range(3):
                controller.step()
        else:
            lottery = ps.LotteryTicket(model, rule, rounds=2)
            lottery.prune()
            lottery.prune()
        assert [int(mask.sum()) for _, mask in ps.named_masks(model)] == [8, 40]


TIGHT = ps.Prune(0.999, scope="global", max_sparsity=0.9995)


@pytest.mark.parametrize("rules", [TIGHT, {"0": 0.5, "*": TIGHT}], ids=["alone", "by name"])
def test_floors_that_cannot_hold_at_the_end_are_refused_at_the_start(rules):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    with pytest.raises(ValueError, match="`max_sparsity` must not keep more"):
        ps.GradualPruning(model, rules, schedule=Constant(0.0), every=1)
    with pytest.raises(ValueError, match="`max_sparsity` must not keep more"):
        ps.LotteryTicket(model, rules, rounds=2)
    assert not ps.is_sparse(model)
