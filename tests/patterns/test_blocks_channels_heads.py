"""Patterns of units against brute force: blocks, channels, heads."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import parasparse as ps
from parasparse.counts import num_kept
from parasparse.patterns import block, channel, head, jointly
from parasparse.patterns.blocks_channels_heads import has_units

shares = st.floats(0, 1)
seeds = st.integers(0, 2**31)


def drawn(shape, seed, levels=6):
    """Return scores >= 0 with many ties."""
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


# Each pattern of units, the shape it is tried on, and the units by brute force: the indices of the
# entries of each, in order.
def blocks(shape, tile):
    starts = itertools.product(*(range(0, n, t) for n, t in zip(shape, tile, strict=True)))
    for start in starts:
        yield list(
            itertools.product(
                *(range(s, min(s + t, n)) for s, t, n in zip(start, tile, shape, strict=True))
            )
        )


def heads(shape, number, dim, fused):
    run = shape[dim] // (number * fused)
    for h in range(number):
        yield [
            index
            for index in itertools.product(*map(range, shape))
            if index[dim] // run % number == h
        ]


UNITS = {
    "block": (block((2, 3)), (6, 9), blocks((6, 9), (2, 3))),
    "block_cut_at_the_edges": (block((2, 3)), (5, 7), blocks((5, 7), (2, 3))),
    "block_of_kernels": (block((2, 1, -1, -1)), (4, 3, 2, 2), blocks((4, 3, 2, 2), (2, 1, 2, 2))),
    "block_1d": (block((4,)), (10,), blocks((10,), (4,))),
    "channel_0": (channel(0), (7, 3, 2), blocks((7, 3, 2), (1, 3, 2))),
    "channel_1": (channel(1), (3, 8), blocks((3, 8), (3, 1))),
    "channel_last": (channel(-1), (3, 2, 5), blocks((3, 2, 5), (3, 2, 1))),
    "channel_of_a_vector": (channel(), (6,), blocks((6,), (1,))),
    "head_fused": (head(4, fused=3), (24, 5), heads((24, 5), 4, 0, 3)),
    "head_of_the_output": (head(3, dim=1), (4, 6), heads((4, 6), 3, 1, 1)),
    "head_of_a_bias": (head(2, fused=3), (12,), heads((12,), 2, 0, 3)),
}


UNITS = {name: (p, shape, list(units)) for name, (p, shape, units) in UNITS.items()}


each_of_units = pytest.mark.parametrize(
    ("pattern", "shape", "units"), UNITS.values(), ids=UNITS.keys()
)


def ranked(units, scores, measure):
    """Return the numbers of the units, the best first."""
    values = [measure([scores[index].item() for index in unit]) for unit in units]
    return sorted(range(len(units)), key=lambda u: (-values[u], u))


def mask_of_units(units, kept, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for unit in kept:
        for index in units[unit]:
            mask[index] = True
    return mask


@each_of_units
@given(shares, seeds)
def test_whole_units_stay_the_ones_with_the_highest_mean(pattern, shape, units, sparsity, seed):
    scores = drawn(shape, seed).double()
    best = ranked(units, scores, lambda values: sum(values) / len(values))
    kept = best[: num_kept(len(units), sparsity)]
    assert torch.equal(pattern(scores, sparsity), mask_of_units(units, kept, shape))


@pytest.mark.parametrize("norm", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize("make", [lambda p: block((2, 3), norm=p), lambda p: channel(1, norm=p)])
def test_a_norm_ranks_units_by_it(norm, make):
    scores = torch.rand(6, 9, dtype=torch.double)
    pattern = make(norm)
    name = "block" if isinstance(pattern, block) else "channel_1"
    units = UNITS["block"][2] if name == "block" else list(blocks((6, 9), (6, 1)))
    best = ranked(units, scores, lambda values: torch.tensor(values).norm(norm).item())
    for kept in range(len(units)):
        mask = pattern(scores, 1 - kept / len(units))
        assert torch.equal(mask, mask_of_units(units, best[:kept], (6, 9)))


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_channels_agree_with_torch_ln_structured(norm, dim):
    layer = nn.Conv2d(8, 12, (3, 5))
    weight = layer.weight.detach().clone()
    size = weight.shape[dim]
    for drop in range(1, size):
        module = nn.Conv2d(8, 12, (3, 5))
        module.weight = nn.Parameter(weight.clone())
        prune.ln_structured(module, "weight", amount=drop, n=norm, dim=dim)
        mask = channel(dim, norm=norm)(weight.abs(), drop / size)
        assert torch.equal(mask, module.weight_mask.bool())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tile", [(1, 4), (4, 4), (3, 5)])
@pytest.mark.parametrize("norm", [1, 2])
def test_blocks_agree_with_torch_ao_where_its_shapes_are_valid(tile, norm):
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(20, 12))
    theirs = WeightNormSparsifier(sparsity_level=0.6, sparse_block_shape=tile, norm=norm)
    theirs.prepare(model, [{"tensor_fqn": "0.weight"}])
    scores = model[0].parametrizations.weight.original.detach().abs()
    theirs.step()
    assert torch.equal(
        block(tile, norm=norm)(scores, 0.6), model[0].parametrizations.weight[0].mask.bool()
    )


@each_of_units
@given(shares, seeds)
def test_units_of_several_tensors_are_ranked_together(pattern, shape, units, sparsity, seed):
    scores = {"a": drawn(shape, seed).double(), "b": drawn(shape, seed + 1).double()}
    masks = jointly(scores, sparsity, pattern=pattern)
    pooled = torch.cat([pattern.pool(score).flatten() for score in scores.values()])
    best = sorted(range(len(pooled)), key=lambda u: (-pooled[u].item(), u))
    kept = best[: num_kept(2 * len(units), sparsity)]
    for place, name in enumerate(scores):
        own = [u - place * len(units) for u in kept if u // len(units) == place]
        assert torch.equal(masks[name], mask_of_units(units, own, shape))


@pytest.mark.parametrize("norm", [None, 1, 2, 3.5, math.inf])
def test_the_score_of_a_unit_is_its_mean_or_its_norm_per_entry(norm):
    scores = torch.rand(4, 5, dtype=torch.double) * 7
    want = (scores ** (norm or 1)).mean(1) ** (1 / (norm or 1))
    found = channel(0, norm=norm).pool(scores).flatten()
    torch.testing.assert_close(found, scores.amax(1) if norm == math.inf else want)


def test_the_score_of_a_unit_has_32_bits():
    scores = torch.rand(500, 1, dtype=torch.double)
    found = channel(0).pool(scores).flatten().tolist()
    for score, rounded in zip(scores.flatten().tolist(), found, strict=True):
        mantissa, exponent = math.frexp(score)
        assert rounded == math.ldexp(round(mantissa * 2**32), exponent - 32)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.long, torch.bool])
def test_means_are_taken_in_enough_bits(dtype):
    scores = torch.zeros(2, 4096, dtype=torch.double)
    scores[0] = 1
    scores[1, 1:] = 1
    assert channel(0)(scores.to(dtype), 0.5)[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1.0, 1e20, 3e37])
@pytest.mark.parametrize("norm", [None, 1, 2, 4, 50, math.inf])
def test_units_of_tiny_and_huge_scores_are_told_apart(scale, norm):
    scores = torch.tensor([[1.0], [2.0], [4.0], [8.0]]).expand(4, 3) * scale
    assert channel(0, norm=norm)(scores, 0.75)[:, 0].tolist() == [False, False, False, True]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_equal_units_tie_whatever_the_order_of_their_entries_and_the_threads(threads):
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed in range(20):
            torch.manual_seed(seed)
            column = torch.rand(1000, 1)
            mask = channel(1)(column.expand(1000, 37).contiguous(), 0.5)
            assert mask[0].tolist() == [True] * 19 + [False] * 18
            whole = torch.rand(300_000)
            shuffled = whole[torch.randperm(300_000)]
            masks = jointly(
                {"a": whole.view(500, 600), "b": shuffled.view(500, 600)}, 0.5,
                pattern=block((-1, -1)),
            )  # fmt: skip
            assert masks["a"].all()
            assert not masks["b"].any()
    finally:
        torch.set_num_threads(was)


def test_means_of_sizes_that_differ_are_per_entry():
    scores = {"a": torch.full((2, 100), 1.0), "b": torch.full((2, 3), 1.5)}
    for norm in (None, 1, 2, math.inf):
        masks = jointly(scores, 0.5, pattern=channel(0, norm=norm))
        assert masks["b"].all()
        assert not masks["a"].any()


class BestRow:
    def __call__(self, scores, sparsity):
        return jointly({"": scores}, sparsity, pattern=self)[""]

    def pool(self, scores):
        return scores.amax(1)

    def spread(self, units, shape):
        return units[:, None].expand(shape)


def test_units_of_ones_own_are_ranked_locally_jointly_and_on_meta():
    scores = torch.tensor([[1.0, 9.0], [4.0, 4.0]])
    assert BestRow()(scores, 0.5).tolist() == [[True, True], [False, False]]
    masks = jointly({"a": scores, "b": scores * 3}, 0.5, pattern=BestRow())
    assert masks["b"].all()
    assert not masks["a"].any()
    assert BestRow()(scores.to("meta"), 0.5).is_meta


def test_a_pattern_with_one_of_the_two_methods_is_none_of_units():
    assert has_units(SimpleNamespace(pool=None, spread=None))
    assert not has_units(SimpleNamespace(pool=None))
    assert not has_units(SimpleNamespace(spread=None))


def test_scores_that_require_grad_are_ranked_as_they_are():
    """With a norm torch warned of a scalar that requires grad."""
    weight = nn.Linear(4, 4).weight
    for norm in (None, 2):
        pattern = channel(0, norm=norm)
        assert torch.equal(pattern(weight.abs(), 0.25), pattern(weight.detach().abs(), 0.25))


def test_an_infinite_score_does_not_flatten_the_norms_of_the_others():
    scores = torch.tensor([[math.inf, 1.0], [1e7, 1e7], [2e7, 2e7], [4e7, 4e7]])
    assert channel(0, norm=50)(scores, 0.5)[:, 0].tolist() == [True, False, False, True]
    wide = torch.tensor([[math.inf], [1e160], [2e160], [4e160]], dtype=torch.float64)
    assert channel(0, norm=2)(wide, 0.5)[:, 0].tolist() == [True, False, False, True]


def test_blocks_larger_than_a_tensor_are_cut():
    scores = torch.tensor([[1.0, 2.0, 3.0, 9.0, 1.0, 1.0]])
    assert block((4, 3))(scores, 0.5).tolist() == [[False, False, False, True, True, True]]
    assert block((4, 16)).pool(scores).shape == (1, 1)
    model = ps.sparsify(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), ps.Prune(0.5, pattern=block((4, 4)))
    )
    assert [row.sparsity for row in ps.summary(model).rows] == [0.5, 0.5]
