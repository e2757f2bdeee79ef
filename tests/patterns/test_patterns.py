"""What a pattern keeps: exact counts, order within groups, ties, nesting, against brute force."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import parasparse as ps
from parasparse import patterns
from parasparse.counts import num_kept
from parasparse.patterns import block, chain, channel, head, jointly, n_of_m, nearly_diagonal
from tests.patterns.test_blocks_channels_heads import UNITS, drawn, seeds, shares

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


@given(st.integers(1, 60), shares, seeds)
def test_unstructured_agrees_with_torch_prune_where_nothing_ties(n, sparsity, seed):
    weight = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float() + 1
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    prune.l1_unstructured(module, "weight", amount=round(n * sparsity))
    assert torch.equal(patterns.unstructured(weight, sparsity), module.weight_mask.bool())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), shares, seeds)
def test_jointly_agrees_with_torch_global_unstructured_where_nothing_ties(sizes, sparsity, seed):
    scores = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed)).float() + 1
    named = {str(i): part for i, part in enumerate(scores.split(sizes))}
    module = nn.ParameterDict(named)
    prune.global_unstructured(
        [(module, name) for name in named], prune.L1Unstructured,
        amount=round(sum(sizes) * sparsity),
    )  # fmt: skip
    for name, mask in jointly(named, sparsity).items():
        assert torch.equal(mask, getattr(module, f"{name}_mask").bool())


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
    st.integers(1, 13),
    st.integers(0, 2),
    st.sampled_from(["keep", "pad"]),
    seeds,
)
def test_n_of_m_keeps_the_n_best_of_every_group(counts, size, dim, remainder, seed):
    n, m = counts
    shape = [2, 3, 2]
    shape[dim] = size
    scores = drawn(shape, seed, 4)
    mask = n_of_m(n, m, dim, remainder=remainder)(scores)
    if size % m == 0:
        assert torch.equal(mask, n_of_m(n, m, dim)(scores))
    rows = scores.movedim(dim, -1).reshape(-1, size).tolist()
    kept = mask.movedim(dim, -1).reshape(-1, size).tolist()
    for row, keep in zip(rows, kept, strict=True):
        for start in range(0, size, m):
            group, got = row[start : start + m], keep[start : start + m]
            most = len(group) if remainder == "keep" and len(group) < m else n
            best = sorted(range(len(group)), key=lambda i: (-group[i], i))[:most]
            assert [i for i in range(len(group)) if got[i]] == sorted(best)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rows", "columns", "k"), [(6, 6, 1), (5, 8, 3), (8, 5, 9), (7, 7, 5)])
def test_nearly_diagonal_agrees_with_torch_ao(rows, columns, k):
    from torch.ao.pruning import NearlyDiagonalSparsifier

    model = nn.Sequential(nn.Linear(columns, rows))
    theirs = NearlyDiagonalSparsifier(nearliness=k)
    theirs.prepare(model, [{"tensor_fqn": "0.weight"}])
    theirs.step()
    mask = nearly_diagonal(k)(torch.rand(rows, columns))
    assert torch.equal(mask, model[0].parametrizations.weight[0].mask.bool())
    deep = nearly_diagonal(k)(torch.rand(rows, columns, 2, 3))
    assert torch.equal(deep, mask[:, :, None, None].expand(-1, -1, 2, 3))


PATTERNS = {
    "unstructured": (patterns.unstructured, (6, 8)),
    **{name: case[:2] for name, case in UNITS.items()},
    "chain": (chain(channel(0), n_of_m(2, 4)), (6, 8)),
    "chain_of_a_band": (chain(nearly_diagonal(5), patterns.unstructured), (6, 8)),
}
each_pattern = pytest.mark.parametrize(("pattern", "shape"), PATTERNS.values(), ids=PATTERNS.keys())


@each_pattern
@given(shares, shares, seeds)
def test_masks_are_nested_in_sparsity(pattern, shape, one, two, seed):
    low, high = sorted((one, two))
    scores = drawn(shape, seed)
    sparser, denser = pattern(scores, high), pattern(scores, low)
    assert sparser.dtype == torch.bool
    assert sparser.shape == shape
    assert not (sparser & ~denser).any()


@pytest.mark.parametrize(
    "pattern", [patterns.unstructured, block((2, 2)), channel(0), chain(channel(0), n_of_m(1, 2))]
)
@given(seeds, shares)
def test_without_ties_the_order_of_the_scores_is_all_that_counts(pattern, seed, sparsity):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, 8, generator=generator, dtype=torch.double)
    mask = pattern(scores, sparsity)
    rows = torch.randperm(3, generator=generator)
    order = torch.stack([2 * rows, 2 * rows + 1], 1).flatten()  # pairs of rows: blocks stay whole
    assert torch.equal(pattern(scores[order], sparsity), mask[order])
    if pattern is patterns.unstructured:
        assert torch.equal(pattern(scores.exp() - 5, sparsity), mask)


def test_a_chain_ranks_its_first_pattern_jointly_and_narrows_what_is_left():
    scores = {"a": torch.rand(6, 8), "b": torch.rand(4, 8) + 1}
    masks = jointly(scores, 0.6, pattern=chain(channel(0), n_of_m(2, 4)))
    assert masks["b"].sum(1).tolist() == [4] * 4
    assert not masks["a"].any()
    steady = torch.tensor([[9.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])  # the better channel
    mask = chain(channel(0), n_of_m(2, 4))(steady, 0.5)
    assert mask.tolist() == [[False] * 4, [True, True, False, False]]
    nested = chain(nearly_diagonal(5), chain(nearly_diagonal(3), n_of_m(1, 2)))
    assert nested == chain(nearly_diagonal(5), nearly_diagonal(3), n_of_m(1, 2))
    assert not nested.takes_sparsity
    mask = nested(torch.rand(6, 6))
    assert not (mask & ~nearly_diagonal(3)(mask)).any()
    assert (mask.view(6, 3, 2).sum(2) <= 1).all()


def test_a_chain_gives_the_budget_to_what_is_left():
    scores = torch.arange(64.0).view(8, 8)
    mask = chain(nearly_diagonal(3), patterns.unstructured)(scores, 0.75)
    assert mask.sum() == 16
    assert torch.equal(mask.nonzero()[-1], torch.tensor([7, 7]))
    whole = chain(nearly_diagonal(3), patterns.unstructured)(scores.long(), 0.75)
    assert torch.equal(mask, whole)


def test_a_pattern_of_ones_own_is_ranked_jointly_as_one_flat_tensor():
    def first(scores, sparsity):
        return torch.arange(scores.numel()).view(scores.shape) < num_kept(scores.numel(), sparsity)

    masks = jointly({"a": torch.rand(2, 3), "b": torch.rand(4)}, 0.3, pattern=first)
    assert masks["a"].all()
    assert masks["b"].tolist() == [True, False, False, False]


def test_a_chain_keeps_its_count_where_kept_scores_are_minus_infinity():
    worst = torch.full((8, 8), -math.inf)
    band = nearly_diagonal(3)
    for made, share in (
        (chain(n_of_m(2, 4), patterns.unstructured), [0.75]),
        (chain(band, patterns.unstructured), [0.9]),
        (chain(band, n_of_m(1, 2)), []),
    ):
        mask = made(worst, *share)
        assert torch.equal(mask, made(torch.ones(8, 8), *share))
        assert mask.sum() == made(torch.ones(8, 8), *share).sum() > 5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_pattern_ranks_float8(dtype):
    scores = torch.tensor([[1.0, 2.0], [4.0, 3.0]]).to(dtype)
    assert channel(0)(scores, 0.5).tolist() == [[False, False], [True, True]]
    assert n_of_m(1, 2)(scores).tolist() == [[False, True], [True, False]]
    assert patterns.unstructured(scores, 0.5).tolist() == [[False, False], [True, True]]


def test_patterns_print_pickle_and_compare():
    made = chain(channel(0, norm=2), n_of_m(2, 4))
    assert eval(repr(made)) == made == pickle.loads(pickle.dumps(made))
    for other in (block((2, np.int64(3))), head(4, fused=3), nearly_diagonal(3)):
        assert eval(repr(other)) == other == pickle.loads(pickle.dumps(other))


WRONG = {
    "fractions": (lambda: n_of_m(2.0, 4.0), "`n` must be a whole number; got 2.0"),
    "words": (lambda: n_of_m("2", "4"), "`n` must be a whole number"),
    "no_dimension": (lambda: channel(None), "`dim` must be a whole number; got None"),
    "heads": (lambda: head("2"), "`num_heads` must be a whole number"),
    "block": (lambda: block((2.5, 2)), "`shape` must be a whole number"),
    "band": (lambda: nearly_diagonal(2.5), "`k` must be a whole number"),
    "norm": (lambda: channel(0, norm=True), "> 0"),
    "class": (lambda: chain(channel, n_of_m(2, 4)), "two or more"),
    "pattern": (lambda: ps.Prune(0.5, pattern="block"), "`pattern` must be a callable"),
    "score": (lambda: ps.Prune(0.5, score=None), "`score` must be a callable"),
    "distribution": (lambda: ps.Prune(0.5, distribution="erk"), "`distribution` must be"),
    "meta": (lambda: channel(7)(torch.ones(4, 4, device="meta"), 0.5), "dimension 7"),
    "joint_meta": (
        lambda: jointly({"a": torch.ones(4, 4, device="meta")}, 0.5, pattern=head(3)),
        "into 3 runs",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_told(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_no_tensors_have_no_masks():
    assert jointly({}, 0.5, pattern=lambda scores, sparsity: scores) == {}


EVERY = {
    "unstructured": lambda s, share: patterns.unstructured(s, share),
    "block": lambda s, share: block((1, 2))(s, share),
    "channel": lambda s, share: channel(0)(s, share),
    "head": lambda s, share: head(2)(s, share),
    "n_of_m": lambda s, share: n_of_m(1, 2)(s),
    "chain": lambda s, share: chain(channel(0), n_of_m(1, 2))(s, share),
}
every = pytest.mark.parametrize("call", EVERY.values(), ids=EVERY.keys())


@every
@pytest.mark.parametrize("value", [1.0, 0.0, -math.inf, math.inf])
def test_equal_scores_keep_the_first_and_the_count(call, value):
    mask = call(torch.full((4, 6), value), 0.5)
    assert torch.equal(mask, call(torch.ones(4, 6), 0.5))
    assert mask.sum() in (6, 12)
    assert mask[0, 0]


@every
def test_empty_tensors_have_empty_masks(call):
    for shape in ((0, 4), (4, 0)):
        assert call(torch.ones(shape), 0.5).shape == shape


@every
def test_meta_scores_give_meta_masks(call):
    mask = call(torch.ones(4, 6, device="meta"), 0.5)
    assert mask.is_meta
    assert mask.dtype == torch.bool
    assert mask.shape == (4, 6)


def test_a_band_lies_where_the_scores_do():
    assert nearly_diagonal(3)(torch.ones(4, 6, device="meta")).is_meta


def test_a_scalar_is_ranked_by_unstructured_and_refused_by_the_others():
    assert patterns.unstructured(torch.tensor(3.0), 0.4).item() is True
    for call in (channel(0), block((1,)), head(1)):
        with pytest.raises(ValueError, match=r"got .*shape \(\)"):
            call(torch.tensor(3.0), 0.5)
    for call in (n_of_m(1, 2), nearly_diagonal(1)):
        with pytest.raises(ValueError, match=r"got .*shape \(\)"):
            call(torch.tensor(3.0))


NAN = torch.full((4, 6), float("nan"))
REFUSED = {
    "nan": (lambda: patterns.unstructured(torch.tensor([float("nan"), 1]), 0.5), "NaN; got 1"),
    "nan_in_groups": (lambda: n_of_m(2, 4)(torch.full((1, 4), float("nan"))), "NaN; got 4"),
    "nan_in_units": (lambda: channel(0)(NAN, 0.5), "NaN; got 24"),
    "nan_in_norms": (lambda: block((2, 2), norm=2)(NAN, 0.5), "NaN; got 24"),
    "nan_at_full_sparsity": (lambda: patterns.unstructured(NAN, 1.0), "NaN; got 24"),
    "inf_minus_inf": (
        lambda: channel(0)(torch.tensor([[math.inf, -math.inf]]), 0.5), "NaN; got 1 NaN of 1"
    ),
    "sparsity": (lambda: patterns.unstructured(torch.ones(2), 1.5), r"in \[0, 1\]"),
    "nan_sparsity": (lambda: patterns.unstructured(torch.ones(2), float("nan")), r"in \[0, 1\]"),
    "unit_sparsity": (lambda: channel(0)(torch.ones(2, 2), -0.1), r"in \[0, 1\]"),
    "remainder": (lambda: n_of_m(2, 4)(torch.ones(4, 6)), r"got shape \(4, 6\)\. Exclude.*\.$"),
    "depthwise": (lambda: n_of_m(2, 4)(torch.ones(32, 1, 3, 3)), "It is depthwise"),
    "group_dimension": (lambda: n_of_m(2, 4)(torch.ones(4)), r"n_of_m\(n=2.*dimension 1; got"),
    "n_above_m": (lambda: n_of_m(5, 4), "n=5, m=4"),
    "remainder_word": (lambda: n_of_m(2, 4, remainder="drop"), 'got \'drop\''),
    "block_dimensions": (lambda: block((4, 4))(torch.ones(8, 8, 3, 3), 0.5), "one size per"),
    "block_of_nothing": (lambda: block((0, 4)), "sizes > 0"),
    "norm_word": (lambda: channel(0, norm=0), "> 0"),
    "norm_of_signed": (lambda: channel(0, norm=2)(-torch.ones(2, 2), 0.5), ">= 0"),
    "channel_dimension": (lambda: channel(2)(torch.ones(2, 2), 0.5), r"\(dim=2.*dimension 2"),
    "heads_do_not_divide": (lambda: head(5, fused=3)(torch.ones(24, 4), 0.5), "into 15 runs"),
    "no_heads": (lambda: head(0), ">= 1"),
    "even_band": (lambda: nearly_diagonal(4), "odd"),
    "wide_band": (lambda: nearly_diagonal(9)(torch.ones(4, 8)), "must fit"),
    "chain_of_one": (lambda: chain(channel(0)), "two or more"),
    "chain_of_two_shares": (lambda: chain(channel(0), patterns.unstructured), "at most one"),
    "chain_with_late_units": (lambda: chain(n_of_m(2, 4), channel(0)), "units must be first"),
    "chain_with_hidden_units": (
        lambda: chain(nearly_diagonal(3), chain(channel(0), n_of_m(1, 2))),
        "units must be first",
    ),
    "jointly_without_a_share": (lambda: jointly({}, 0.5, pattern=n_of_m(2, 4)), "takes none"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_ranked_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_complex_scores_and_missing_sparsities_are_refused():
    with pytest.raises(TypeError, match="real"):
        patterns.unstructured(torch.ones(2, dtype=torch.cfloat), 0.5)
    with pytest.raises(TypeError, match="`sparsity` must be a number"):
        chain(channel(0), n_of_m(1, 2))(torch.ones(2, 2))
