"""Floors: the highest of all tensors together, of which each keeps some of its own."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from parasparse.counts import least_kept, num_kept
from parasparse.patterns import jointly
from parasparse.patterns.selection.scores import as_scores
from parasparse.patterns.selection.together import ranked_together


def greedy(scores, kept, floors):
    """First the best of each tensor up to its floor, then the best of all that are left."""
    ranked = sorted(
        (-value, number, place)
        for number, score in enumerate(scores)
        for place, value in enumerate(score.tolist())
    )
    chosen = set()
    for number, floor in enumerate(floors):
        chosen |= set([each for each in ranked if each[1] == number][:floor])
    rest = [each for each in ranked if each not in chosen]
    chosen |= set(rest[: kept - len(chosen)])
    masks = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
    for _, number, place in chosen:
        masks[number][place] = True
    return masks


# Few values tie often; an offset for each tensor lets some of them lose nearly all.
tensors = st.lists(
    st.tuples(st.integers(-3, 3), st.lists(st.integers(0, 4), max_size=25)), min_size=1, max_size=5
)


@given(tensors, st.floats(0, 1), st.floats(0, 1))
def test_floors_are_met_and_the_best_of_the_rest_are_kept(drawn, sparsity, max_sparsity):
    scores = [torch.tensor([offset + v for v in values]).double() for offset, values in drawn]
    total = sum(map(len, scores))
    kept, floors = num_kept(total, sparsity), [least_kept(len(s), max_sparsity) for s in scores]
    assume(sum(floors) <= kept)
    found = list(ranked_together(list(map(as_scores, scores)), sparsity, max_sparsity=max_sparsity))
    assert sum(int(mask.sum()) for mask in found) == kept
    for mask, expected in zip(found, greedy(scores, kept, floors), strict=True):
        assert torch.equal(mask, expected)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_below_one_no_tensor_is_emptied(numel, max_sparsity):
    least = least_kept(numel, max_sparsity)
    assert num_kept(numel, max_sparsity) <= least <= numel
    assert least >= 1 or numel == 0 or max_sparsity == 1


def test_floors_that_keep_too_much_are_refused():
    scores = {name: torch.rand(5) for name in "abc"}
    with pytest.raises(ValueError, match="it keeps 3 of 15, and a sparsity of 0.9 keeps 1"):
        jointly(scores, 0.9, max_sparsity=0.95)
