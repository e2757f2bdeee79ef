"""The solvers on single layers: what must hold, and what NumPy finds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse.oneshot.admm import admm
from parasparse.oneshot.least_squares import by_conjugate_gradients, least_squares
from parasparse.oneshot.obs import obs
from parasparse.oneshot.solve import by_sparsegpt
from parasparse.oneshot.supports import Support, highest_in_rows
from parasparse.oneshot.swaps import swapped
from parasparse.patterns import block, channel, n_of_m, unstructured
from parasparse.scores.damping import damped
from tests.oneshot import reference
from tests.oneshot.problems import error_of, layer, problem

SEEDS = st.integers(0, 10_000)


def drawn(seed, shape, share=0.5):
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < share)


def given_mask(problem, mask, block=128):
    def choose(scores, start, stop):
        return mask[..., start:stop]

    return obs(problem.weights, problem.hessian, choose, step=block, block=block)[0]


@given(SEEDS, st.floats(0, 1), st.sampled_from([0.0, 0.01, 1.0]))
def test_least_squares_is_that_of_numpy(seed, share, damping):
    weights, x = layer(seed)
    own = problem(weights, x, damping)
    mask = drawn(seed, weights.shape, share)
    matrix, _ = reference.damped(x.T @ x, damping)
    expected = reference.least_squares(weights, mask.numpy(), matrix)
    for found in (
        least_squares(own.weights, mask[None], own.hessian.matrix),
        by_conjugate_gradients(own.weights, mask[None], own.hessian.matrix, own.weights),
    ):
        assert not found[0][~mask].any()
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


@given(SEEDS)
def test_nothing_on_a_support_beats_least_squares_and_more_entries_never_harm(seed):
    own = problem(*layer(seed))
    mask = drawn(seed, own.weights.shape)
    more = mask | drawn(seed + 1, own.weights.shape)
    least = error_of(own, least_squares(own.weights, mask, own.hessian.matrix))
    assert error_of(own, least_squares(own.weights, more, own.hessian.matrix)) <= least + 1e-9
    for other in (own.weights * mask, given_mask(own, mask)):
        assert error_of(own, other) >= least - 1e-9


def test_what_keeps_everything_stays_to_the_bit():
    own = problem(*layer())
    mask = torch.ones_like(own.weights, dtype=torch.bool)
    assert torch.equal(least_squares(own.weights, mask, own.hessian.matrix), own.weights)
    assert torch.equal(given_mask(own, mask), own.weights)


@given(SEEDS, st.sampled_from([1, 3, 16, 40]))
def test_blocks_change_nothing_for_a_given_mask(seed, block):
    own = problem(*layer(seed, inputs=40))
    mask = drawn(seed, own.weights.shape)
    found = given_mask(own, mask, block)
    torch.testing.assert_close(found, given_mask(own, mask), rtol=1e-9, atol=1e-9)
    assert not found[~mask].any()


def test_independent_inputs_need_no_update():
    weights, _ = layer()
    own = problem(weights, np.diag(np.arange(1.0, 17)))
    mask = drawn(0, own.weights.shape)
    for found in (given_mask(own, mask), least_squares(own.weights, mask, own.hessian.matrix)):
        torch.testing.assert_close(found, own.weights * mask, rtol=1e-12, atol=1e-12)


def test_without_the_first_column_obs_is_least_squares():
    own = problem(*layer())
    mask = torch.ones_like(own.weights, dtype=torch.bool)
    mask[..., 0] = False
    expected = least_squares(own.weights, mask, own.hessian.matrix)
    torch.testing.assert_close(given_mask(own, mask), expected, rtol=1e-9, atol=1e-9)


def test_one_weight_at_a_time_ends_at_least_squares_on_its_support():
    weights, x = layer(inputs=10)
    matrix, _ = reference.damped(x.T @ x, 0.01)
    expected = np.stack([reference.brain_surgeon(row, matrix, 4) for row in weights])
    mask = torch.from_numpy(expected != 0)[None]
    own = problem(weights, x)
    np.testing.assert_allclose(
        least_squares(own.weights, mask, own.hessian.matrix)[0], expected, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["row", "tensor", "2:4", "1:3"])
@pytest.mark.parametrize("size", [12, 24, 48])
def test_sparsegpt_is_that_of_numpy(kind, size):
    weights, x = layer(inputs=72)
    matrix, _ = reference.damped(x.T @ x, 0.01)
    if ":" in kind:
        n, m = int(kind[0]), int(kind[2])
        support = Support(None, n_of_m(n, m), "row")

        def choose(scores):
            return reference.highest(scores, n)

        expected, mask = reference.sparsegpt(weights, matrix, choose, m)
    else:
        support = Support(0.5, unstructured, kind)

        def choose(scores):
            ranked = scores.reshape(1, -1) if kind == "tensor" else scores
            return reference.highest(ranked, ranked.shape[1] // 2).reshape(scores.shape)

        expected, mask = reference.sparsegpt(weights, matrix, choose, size)
    found = by_sparsegpt(problem(weights, x), support, size)
    np.testing.assert_array_equal(found.mask[0], mask)
    np.testing.assert_allclose(found.weights[0], expected, atol=1e-9)


@given(SEEDS, st.floats(0, 1), st.integers(1, 50), st.sampled_from(["row", "tensor"]))
def test_sparsegpt_keeps_exact_counts_in_any_blocks(seed, sparsity, block, scope):
    own = problem(*layer(seed, outputs=3, inputs=23))
    found = by_sparsegpt(own, Support(sparsity, unstructured, scope), block)
    if scope == "row":
        assert (found.mask.sum(-1) == 23 - round(23 * sparsity)).all()
    assert scope == "row" or found.mask.sum() == 69 - round(69 * sparsity)


@given(st.lists(st.integers(-2, 2), min_size=12, max_size=12), st.integers(0, 4))
def test_equal_scores_of_a_row_keep_the_first(values, kept):
    scores = torch.tensor(values, dtype=torch.float32).view(3, 4)
    expected = reference.highest(scores.numpy(), kept)
    np.testing.assert_array_equal(highest_in_rows(scores, kept), expected)


@given(SEEDS, st.sampled_from([1, 4]), st.integers(1, 6))
def test_swaps_never_raise_the_error_and_keep_counts(seed, width, swaps):
    own = problem(*layer(seed))
    mask = highest_in_rows(torch.rand(1, 6, 4, 4), 2).flatten(2)
    held = mask | drawn(seed, mask.shape, 0.7)
    matrix = own.hessian.matrix
    found = swapped(own.weights, mask, matrix, swaps, width=width, held=held)
    groups = (1, 6, 16 // width, width) if width > 1 else (1, 6, 1, 16)
    assert torch.equal(found.view(groups).sum(-1), mask.view(groups).sum(-1))
    assert not (found & ~held).any()
    before, after = (error_of(own, least_squares(own.weights, m, matrix)) for m in (mask, found))
    assert after <= before + 1e-9
    assert ((found != mask).sum(-1) <= 2 * swaps).all()


@pytest.mark.parametrize("seed", range(3))
def test_swaps_are_those_found_by_trying_all(seed):
    weights, x = layer(seed, outputs=4, inputs=10)
    own = problem(weights, x)
    mask = highest_in_rows(own.weights.abs(), 5)
    matrix, _ = reference.damped(x.T @ x, 0.01)
    for swaps in (1, 4):
        found = swapped(own.weights, mask, own.hessian.matrix, swaps)
        expected = reference.swapped(weights, mask[0].numpy(), matrix, swaps)
        np.testing.assert_array_equal(found[0], expected)


def test_rows_that_keep_nothing_or_everything_have_no_swaps():
    own = problem(*layer())
    mask = drawn(0, own.weights.shape)
    mask[0, 0], mask[0, 1] = False, True
    found = swapped(own.weights, mask, own.hessian.matrix, 3)
    assert torch.equal(found[0, :2], mask[0, :2])
    assert not swapped(own.weights, mask & False, own.hessian.matrix, 3).any()


def test_enough_swaps_end_where_no_swap_of_the_best_pair_helps():
    own = problem(*layer())
    mask = highest_in_rows(own.weights.abs(), 8)
    matrix = own.hessian.matrix
    far, once_more = (swapped(own.weights, mask, matrix, n) for n in (100, 101))
    assert torch.equal(far, once_more)
    assert error_of(own, least_squares(own.weights, far, matrix)) < 0.9 * error_of(
        own, least_squares(own.weights, mask, matrix)
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_support_beats_all_of_them_and_admm_comes_near(seed):
    weights, x = layer(seed, outputs=4, inputs=9)
    own = problem(weights, x)
    matrix, _ = reference.damped(x.T @ x, 0.01)
    best = reference.best(weights, matrix, 4)
    support = Support(5 / 9, unstructured, "row")
    sparsegpt = by_sparsegpt(own, support, 128)
    mask = admm([own], support)["w"]
    assert (mask.sum(-1) == 4).all()
    found = error_of(own, least_squares(own.weights, mask, own.hessian.matrix))
    assert best - 1e-9 <= found < error_of(own, sparsegpt.weights)
    assert found < 2 * best


SUPPORTS = {
    "row": Support(0.6, unstructured, "row"),
    "tensor": Support(0.6, unstructured, "tensor"),
    "global": Support(0.6, unstructured, "global"),
    "2:4": Support(None, n_of_m(2, 4), "row"),
    "2:4 of outputs": Support(None, n_of_m(2, 4, 0), "row"),
    "blocks": Support(0.5, block((2, 4)), "row"),
    "channels": Support(0.5, channel(0), "row"),
}


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS.keys())
def test_admm_beats_least_squares_on_the_support_of_magnitudes(support):
    total = {"admm": 0.0, "magnitude": 0.0}
    for seed in range(3):
        own = problem(*layer(seed, outputs=16, inputs=32))
        scaled = own.weights.abs() * own.hessian.scale.unsqueeze(-2)
        masks = {
            "admm": admm([own], support)["w"],
            "magnitude": support.masks({"w": scaled}, [own])["w"],
        }
        assert masks["admm"].sum() == masks["magnitude"].sum()
        for name, mask in masks.items():
            new = least_squares(own.weights, mask, own.hessian.matrix)
            total[name] += error_of(own, new)
    assert total["admm"] <= total["magnitude"] * (1 + 1e-9)


@given(SEEDS, st.permutations(range(6)), st.floats(0.01, 100))
def test_admm_follows_rows_and_scales(seed, order, scale):
    weights, x = layer(seed)
    support = Support(0.5, unstructured, "row")
    mask = admm([problem(weights, x)], support)["w"]
    assert torch.equal(admm([problem(weights[order], x * scale)], support)["w"], mask[:, order])


def test_admm_keeps_a_present_mask_and_ranks_tensors_together():
    held = drawn(3, (1, 6, 16), 0.7)
    one = problem(*layer(1), held=held[0], name="one")
    two = problem(*layer(2), name="two")
    masks = admm([one, two], Support(0.6, unstructured, "global"))
    assert not (masks["one"] & ~held).any()
    assert sum(mask.sum() for mask in masks.values()) == 192 - round(192 * 0.6)


def test_damping_grows_until_the_matrix_can_be_inverted():
    _, x = layer(samples=5)
    gram = torch.from_numpy(x.T @ x)[None]
    assert damped(gram, 0.01).damping == 0.01
    assert damped(gram, 1e-18).damping > 1e-18
    with pytest.raises(RuntimeError, match="damping"):
        damped(-gram, 0.01)
    with pytest.raises(RuntimeError, match="damping"):
        damped(gram * float("nan"), 0.01)


@given(SEEDS)
def test_the_factor_of_the_inverse(seed):
    _, x = layer(seed)
    hessian = damped(torch.from_numpy(x.T @ x)[None], 0.01)
    upper = hessian.inverse_factor
    inverse = torch.linalg.inv(hessian.matrix)
    torch.testing.assert_close(upper.mT @ upper, inverse, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(upper, upper.triu())
    torch.testing.assert_close(
        hessian.inverse_diagonal(), inverse.diagonal(dim1=-2, dim2=-1), rtol=1e-8, atol=1e-10
    )
