"""Pruning what is sparse already: targets are absolute, and zeros go first."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.counts import num_kept
from parasparse.distributions import erk
from parasparse.patterns import chain, channel, n_of_m
from parasparse.scores import magnitude, random, zeros_first

shares = st.floats(0, 1)


def sparse_net(sparsity, seed=0):
    """Return a dense model that holds zeros, as a checkpoint of a pruned one does."""
    torch.manual_seed(seed)
    return ps.squash(ps.sparsify(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)), sparsity))


def masks(model):
    return {name: mask.clone() for name, mask in ps.named_masks(model)}


RULES = {
    "local": lambda s: s,
    "global": lambda s: ps.Prune(s, scope="global"),
    "erk": lambda s: ps.Prune(s, distribution=erk),
    "erk_with_a_floor": lambda s: ps.Prune(
        s, distribution=partial(erk, max_sparsity=0.999 if s < 0.99 else 1.0)
    ),
    "random": lambda s: ps.Prune(s, score=zeros_first(random)),
    "global_random": lambda s: ps.Prune(s, score=zeros_first(random), scope="global"),
}


@pytest.mark.filterwarnings("ignore:no entry is left")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@given(shares, shares)
def test_the_target_is_absolute_whatever_was_zero(rule, before, after):
    model = ps.sparsify(sparse_net(before), rule(after))
    total = sum(mask.numel() for mask in masks(model).values())
    kept = {name: int(mask.sum()) for name, mask in masks(model).items()}
    if rule in (RULES["local"], RULES["random"]):
        assert kept == {n: num_kept(m.numel(), after) for n, m in masks(model).items()}
    else:
        assert sum(kept.values()) == num_kept(total, after)


@pytest.mark.filterwarnings("ignore:no entry is left")
@pytest.mark.parametrize("rule", ["local", "global", "random", "global_random"])
@given(shares, shares)
def test_zeros_go_first_so_that_masks_nest(rule, one, two):
    low, high = sorted((one, two))
    model = sparse_net(low)
    ps.sparsify(model, "zeros")
    first = masks(model)
    assert [int(m.sum()) for m in first.values()] == [
        num_kept(m.numel(), low) for m in first.values()
    ]
    ps.sparsify(model, RULES[rule](high))
    if rule.startswith("global"):
        # Jointly the budget is the same, so that nothing that was 0 is needed either.
        assert (
            sum(int(m.sum()) for m in first.values())
            >= sum(int(m.sum()) for m in masks(model).values()) - 1
        )
        dropped = torch.cat([m.flatten() for m in first.values()]).logical_not()
        now = torch.cat([m.flatten() for m in masks(model).values()])
        assert (now & dropped).sum() <= 1
    else:
        assert not any((masks(model)[name] & ~first[name]).any() for name in first)


def test_a_score_that_ranks_zeros_high_needs_zeros_first():
    model = sparse_net(0.5)

    def upside_down(tensor, name):
        return -magnitude(tensor)

    ps.sparsify(model, {"0": ps.Prune(0.75, score=upside_down)})
    assert not model[0].weight.any()  # it kept zeros only
    ps.sparsify(model, {"0": ps.Prune(0.75, score=zeros_first(upside_down))})
    assert model[0].weight.count_nonzero() == 96


def test_whole_numbers_are_scored_with_zeros_first_too():
    def rank(tensor, name):
        return torch.arange(tensor.numel()).view(tensor.shape)

    scores = zeros_first(rank)(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "w")
    assert scores.tolist() == [[-torch.inf, 1.0], [2.0, -torch.inf]]


def test_patterns_prune_a_sparse_model_further():
    model = sparse_net(0.5)
    ps.sparsify(model, ps.Prune(pattern=n_of_m(1, 4)))
    for name, mask in masks(model).items():
        assert (mask.view(-1, 4).sum(1) == 1).all()
        rows = ps.stored(model, name).detach().view(-1, 4)
        assert ((rows != 0).any(1) == (mask.view(-1, 4) & (rows != 0)).any(1)).all()
    ps.sparsify(model, ps.Prune(0.5, pattern=chain(channel(0), n_of_m(1, 4))))
    assert [int(m.any(1).sum()) for m in masks(model).values()] == [12, 4]


def test_masks_alone_do_not_hold_what_squash_makes_zero():
    model = nn.Linear(10, 10)
    ps.sparsify(model, ps.Prune(0.5, score=random))
    dropped = ~ps.mask_of(model, "weight")
    ps.sparsify(model, 0.9)  # ranks what is stored: what was dropped may come back
    kept = ps.mask_of(model, "weight")
    assert torch.equal(kept, ps.patterns.unstructured(ps.stored(model, "weight").abs(), 0.9))
    ps.sparsify(model, {"weight": ~dropped})
    ps.sparsify(ps.squash(model), 0.9)
    assert not (ps.mask_of(model, "weight") & dropped).any()


@pytest.mark.filterwarnings("ignore:no entry is left")
@given(shares)
def test_jointly_ranked_units_keep_the_budget_of_units(sparsity):
    model = ps.sparsify(sparse_net(0.0), ps.Prune(sparsity, pattern=channel(0), scope="global"))
    whole = [mask.all(1) for mask in masks(model).values()]
    assert all(
        torch.equal(mask.any(1), w) for mask, w in zip(masks(model).values(), whole, strict=True)
    )
    assert sum(int(w.sum()) for w in whole) == num_kept(32, sparsity)
