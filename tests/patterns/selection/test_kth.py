"""The k-th score: exact against a full sort, whatever the sample says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse.patterns.selection import kth
from parasparse.patterns.selection.kth import find_threshold, highest
from parasparse.patterns.selection.scores import as_scores

DTYPES = [torch.half, torch.bfloat16, torch.float, torch.double, torch.int32, torch.int64]
VALUES = [0.0, -0.0, 1.0, 1.5, -2.0, 7.0, math.inf, -math.inf]


def brute(scores, kept):
    """Rank all entries by score, then by place."""
    flat = [value for score in scores for value in score.flatten().tolist()]
    best = set(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:kept])
    mask = torch.tensor([i in best for i in range(len(flat))], dtype=torch.bool)
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def small_sample(monkeypatch):
    """Take the road of large tensors on small ones."""
    monkeypatch.setattr(kth, "_SAMPLE", 8)


lists = st.lists(st.lists(st.sampled_from(VALUES), max_size=30), min_size=1, max_size=4)


@given(lists, st.floats(0, 1))
def test_highest_is_the_sorted_answer_over_all_tensors(values, share):
    scores = [torch.tensor(v) for v in values]
    kept = round(share * sum(map(len, values)))
    assert same(highest(scores, kept), brute(scores, kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampling_changes_nothing_whatever_the_dtype_the_ties_and_the_sparsity(small_sample, dtype):
    generator = torch.Generator().manual_seed(1)
    for draw in range(40):
        levels = 2 ** (draw % 11)  # from two values to nearly no ties
        scores = [
            torch.randint(-levels, levels, (n,), generator=generator).to(dtype)
            for n in (150, 1, 99)
        ]
        for kept in (1, 25, 125, 249):
            assert same(highest(scores, kept), brute(scores, kept))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.ones(n),
        lambda n: torch.full((n,), -math.inf),
        lambda n: torch.arange(n, dtype=torch.float),
        lambda n: torch.arange(n, 0, -1, dtype=torch.float),
        lambda n: torch.cat([torch.zeros(n - 20), torch.rand(20)]),
        lambda n: torch.cat([torch.rand(20), torch.full((n - 20,), math.inf)]),
        lambda n: torch.where(torch.arange(n) % 7 == 0, 5.0, torch.rand(n)),
        lambda n: 10.0 ** torch.linspace(-38, 38, n),
        lambda n: torch.arange(n) % 2 == 0,
        lambda n: torch.arange(n) + 2**53,  # floats would merge these
    ],
    ids=["equal", "minus_inf", "up", "down", "zeros", "infs", "spike", "wide", "bool", "long"],
)
@pytest.mark.parametrize("kept", [1, 2, 19, 20, 21, 143, 500, 980, 981, 999])
def test_sampling_changes_nothing_on_awkward_scores(small_sample, make, kept):
    scores = list(make(1000).split([400, 0, 600]))
    assert same(highest(scores, kept), brute(scores, kept))


def test_a_sample_that_misleads_costs_time_only(monkeypatch):
    monkeypatch.setattr(kth, "_SAMPLE", 8)
    scores = torch.randn(500)
    for wrong in (torch.full((8,), -9.0), torch.full((8,), 9.0), scores[:8]):
        monkeypatch.setattr(kth, "_sample", lambda flats, wrong=wrong: wrong)
        for kept in (1, 50, 250, 499):
            assert same(highest([scores], kept), brute([scores], kept))


def test_a_sample_that_misleads_is_compared_with_every_dtype_without_rounding(monkeypatch):
    near = torch.tensor(0.1, dtype=torch.half).item()
    scores = [torch.full((90,), near, dtype=torch.half), torch.full((10,), near + 1e-6)]
    monkeypatch.setattr(kth, "_SAMPLE", 8)
    monkeypatch.setattr(kth, "_sample", lambda flats: scores[1].repeat(40))
    for kept in (5, 10, 15):
        assert same(highest(scores, kept), brute(scores, kept))


def test_scores_of_several_dtypes_are_compared_without_rounding():
    near = torch.tensor(0.1, dtype=torch.half).item()
    scores = [torch.tensor([near], dtype=torch.half), torch.tensor([near + 1e-6, near - 1e-6])]
    assert same(highest(scores, 2), [torch.tensor([True]), torch.tensor([True, False])])
    whole = [torch.tensor([2.0**24]), torch.tensor([2**24 + 1])]
    assert same(highest(whole, 1), [torch.tensor([False]), torch.tensor([True])])
    integers = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2**53, 2**53 + 1])]
    assert same(highest(integers, 1), [torch.tensor([False]), torch.tensor([False, True])])


def test_unsigned_scores_that_torch_does_not_compare_are_refused():
    with pytest.raises(TypeError, match="uint64: torch cannot compare"):
        highest([torch.tensor([1], dtype=torch.uint64)], 1)


def test_the_default_device_does_not_matter():
    scores = torch.rand(300_000)
    wanted = highest([scores], 30_000)
    with torch.device("meta"):
        assert same(highest([scores], 30_000), wanted)


def test_thousands_of_tensors_are_ranked_together():
    parts = torch.rand(200_000).split(40)
    masks = highest(parts, 1_000)
    assert torch.equal(torch.cat(masks), highest([torch.cat(parts)], 1_000)[0])


def test_strides_do_not_matter():
    scores = torch.randint(0, 3, (4, 3, 5, 5)).float()
    for view in (
        scores,
        scores.contiguous(memory_format=torch.channels_last),
        scores.movedim(0, 3),
    ):
        assert same(highest([view], 70), brute([view], 70))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_masks_and_torchs_randomness_stays(threads):
    scores = [torch.randn(200_000, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    scores[1][::3] = scores[0][5]
    before, was = torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        masks = highest(scores, 40_000)
    finally:
        torch.set_num_threads(was)
    assert torch.equal(before, torch.get_rng_state())
    order = torch.cat(scores).argsort(descending=True, stable=True)[:40_000]
    wanted = torch.zeros(400_000, dtype=torch.bool).index_fill_(0, order, True)
    assert torch.equal(torch.cat(masks), wanted)


def test_the_cut_counts_what_is_above_and_equal():
    scores = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])]
    cut = find_threshold([as_scores(score) for score in scores], 3)
    assert (cut.value, cut.above, cut.equal) == (2.0, 1, 3)


def test_no_copy_of_all_scores_is_made():
    scores, was = [torch.randn(1 << 20) for _ in range(4)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # each thread has a piece of its own
        highest(scores, 1 << 20)
        with torch.profiler.profile(profile_memory=True) as profile:
            highest(scores, 1 << 20)
    finally:
        torch.set_num_threads(was)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 1 << 20  # the mask of one tensor, a byte an entry


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_refused_on_the_road_of_large_tensors(small_sample, dtype, sign):
    scores = torch.randn(200).to(dtype)
    scores[150] = sign * math.nan
    scores[3], scores[4] = math.inf, -math.inf  # their sum is NaN as well
    for kept in (0, 50, 200):
        with pytest.raises(ValueError, match="got 1 NaN of 200"):
            highest([scores], kept)
    scores[150] = 0
    assert same(highest([scores], 50), brute([scores], 50))


@pytest.mark.parametrize("make", [torch.randn, lambda n: torch.randn(n).abs()])
def test_large_bfloat16_tensors_are_ranked_exactly(make):
    torch.manual_seed(0)
    scores = [make(n).bfloat16() for n in (100_000, 90_000, 10_000)]
    flat = torch.cat(scores).double()
    order = flat.argsort(descending=True, stable=True)
    for kept in (1, 20_000, 199_999):
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:kept]] = True
        assert torch.cat(highest(scores, kept)).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_the_default_device_plays_no_part(small_sample, dtype):
    scores = [torch.randn(200).to(dtype).abs()]
    for kept in (0, 60, 200):
        with torch.device("meta"):
            found = highest(scores, kept)
        assert same(found, brute(scores, kept))
