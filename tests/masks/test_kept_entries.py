"""Positions of kept entries say what masks say, without masks."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse.masks.kept_entries import (
    KeptEntries,
    carrying,
    draw_free,
    number_in_both,
    number_kept,
)

masks = st.builds(
    lambda seed, share, shape: (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    ),
    st.integers(0, 2**32),
    st.floats(0, 1),
    st.just((5, 7)),
)


def positions(mask):
    return mask.flatten().nonzero().flatten()


def kept(mask):
    return KeptEntries(positions(mask), mask.shape)


@given(masks, masks)
def test_counts_are_those_of_the_masks(one, other):
    assert number_kept(kept(one)) == number_kept(one) == int(one.sum())
    for a in (one, kept(one)):
        for b in (other, kept(other)):
            assert number_in_both(a, b) == int((one & other).sum())


@given(masks, masks, st.sampled_from([torch.float32, torch.complex64, torch.bfloat16]))
def test_values_are_carried_to_common_positions_and_0_elsewhere(old, new, dtype):
    dense = torch.randn(old.shape, dtype=dtype) * old
    values = carrying(positions(old), positions(new))(dense[old])
    assert values.dtype == dtype
    assert values.equal(torch.where(old, dense, torch.zeros((), dtype=dtype))[new])


@given(masks, st.floats(0, 1), st.integers(0, 2**32))
def test_free_entries_are_drawn_sorted_once_and_exactly(mask, share, seed):
    count = round(int((~mask).sum()) * share)
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_free(positions(mask), mask.numel(), count, generator=generator)
    assert len(drawn) == count
    assert drawn.equal(drawn.unique())
    assert not mask.flatten()[drawn].any()
    again = draw_free(positions(mask), mask.numel(), count, generator=generator.manual_seed(seed))
    assert again.equal(drawn)


def test_all_free_entries_are_drawn_equally_often():
    generator, taken = torch.Generator().manual_seed(0), torch.tensor([0, 1, 4])
    for count in (1, 2, 4):  # of 5: few are drawn, and of many the others
        draws = Counter[int]()
        for _ in range(1000):
            draws.update(draw_free(taken, 8, count, generator=generator).tolist())
        assert draws.keys() == {2, 3, 5, 6, 7}
        spread = (1000 * count / 5 * (1 - count / 5)) ** 0.5
        assert all(abs(n - 1000 * count / 5) < 5 * spread for n in draws.values())


def test_places_beyond_int32_are_drawn_in_memory_of_what_is_kept():
    numel = 2**40
    one = draw_free(torch.tensor([0, 2**39]), numel, 1000)
    two = draw_free(one, numel, 1000)
    assert len(torch.cat([one, two]).unique()) == 2000
    assert int(one.max()) > 2**32
