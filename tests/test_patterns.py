import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from parasparse import patterns
from parasparse._checks import num_kept

shares = st.floats(0, 1)
# Few values, so that ties are common; infinities and signed zeros are scores like any other.
score_lists = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, float("inf"), -float("inf"), 1e-30]), max_size=40
)


@given(st.integers(0, 10**9), shares)
def test_num_kept_is_n_minus_the_rounded_share(n, sparsity):
    kept = num_kept(n, sparsity)
    assert 0 <= kept <= n
    assert kept == n - round(n * sparsity)
    assert abs((n - kept) - n * sparsity) <= 0.5 + 1e-6 * n


@given(st.integers(0, 10**6), shares, shares)
def test_num_kept_falls_as_sparsity_rises(n, one, two):
    low, high = sorted((one, two))
    assert num_kept(n, low) >= num_kept(n, high)


@given(score_lists, shares)
def test_unstructured_keeps_the_best_and_of_ties_the_first(values, sparsity):
    mask = patterns.unstructured(torch.tensor(values), sparsity)
    best_first = sorted(range(len(values)), key=lambda i: (-values[i], i))  # brute force
    wanted = set(best_first[: num_kept(len(values), sparsity)])
    assert {i for i, kept in enumerate(mask.tolist()) if kept} == wanted


@given(score_lists, shares, shares)
def test_unstructured_masks_are_nested_in_sparsity(values, one, two):
    low, high = sorted((one, two))
    scores = torch.tensor(values)
    sparser, denser = patterns.unstructured(scores, high), patterns.unstructured(scores, low)
    assert not (sparser & ~denser).any()


@given(st.integers(1, 60), shares, st.integers(0, 2**31))
def test_unstructured_agrees_with_torch_prune_where_nothing_ties(n, sparsity, seed):
    weight = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float() + 1
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight)
    prune.l1_unstructured(module, "weight", amount=round(n * sparsity))
    assert torch.equal(patterns.unstructured(weight, sparsity), module.weight_mask.bool())


@pytest.mark.parametrize(
    "dtype", [torch.half, torch.bfloat16, torch.float, torch.double, torch.long]
)
def test_unstructured_takes_scores_of_any_real_dtype(dtype):
    scores = torch.arange(10).to(dtype)
    assert patterns.unstructured(scores, 0.7).nonzero().flatten().tolist() == [7, 8, 9]


def test_unstructured_counts_in_logical_order_whatever_the_strides():
    scores = torch.ones(2, 3).T
    assert patterns.unstructured(scores, 0.5).tolist() == [
        [True, True],
        [True, False],
        [False, False],
    ]


@given(
    st.integers(1, 5).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
def test_n_of_m_keeps_the_n_best_of_every_group(counts, groups, dim, seed):
    n, m = counts
    shape = [2, 3, 2]
    shape[dim] = m * groups
    scores = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    mask = patterns.n_of_m(n, m, dim)(scores)
    rows = zip(
        scores.movedim(dim, -1).reshape(-1, m).tolist(),
        mask.movedim(dim, -1).reshape(-1, m).tolist(),
        strict=True,
    )
    for row, kept in rows:
        best = sorted(range(m), key=lambda i: (-row[i], i))[:n]
        assert [i for i in range(m) if kept[i]] == sorted(best)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: patterns.unstructured(torch.tensor([float("nan"), 1]), 0.5),
            "must not be NaN; got 1",
        ),
        (lambda: patterns.n_of_m(2, 4)(torch.full((1, 4), float("nan"))), "must not be NaN; got 4"),
        (lambda: patterns.unstructured(torch.ones(2), 1.5), r"in \[0, 1\]"),
        (lambda: patterns.unstructured(torch.ones(2), float("nan")), r"in \[0, 1\]"),
        (lambda: patterns.n_of_m(2, 4)(torch.ones(4, 6)), "groups of 4; got shape"),
        (lambda: patterns.n_of_m(2, 4)(torch.ones(4)), r"dimension 1; got a tensor of shape \(4,\)"),
        (lambda: patterns.n_of_m(5, 4), "n=5, m=4"),
    ],
)
def test_what_cannot_be_ranked_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_complex_scores_are_refused():
    with pytest.raises(TypeError, match="real"):
        patterns.unstructured(torch.ones(2, dtype=torch.cfloat), 0.5)
