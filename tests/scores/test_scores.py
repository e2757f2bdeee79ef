import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse import scores
from parasparse.scores.weights_alone import is_entrywise


def test_magnitude_is_the_modulus_of_complex_entries():
    tensor = torch.tensor([3 + 4j, -1j])
    assert scores.magnitude(tensor).tolist() == [5.0, 1.0]


@pytest.mark.parametrize(
    "dtype", [torch.half, torch.bfloat16, torch.double, torch.float8_e4m3fn], ids=str
)
def test_magnitude_ranks_every_dtype(dtype):
    tensor = torch.tensor([-2.0, 0.5, 1.0]).to(dtype)
    assert scores.magnitude(tensor).float().tolist() == [2.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64], ids=str)
def test_magnitude_ranks_the_lowest_integer_highest(dtype):
    least = torch.iinfo(dtype).min
    assert scores.magnitude(torch.tensor([least, 1], dtype=dtype)).tolist() == [-least, 1]


def test_magnitude_tells_large_integers_apart():
    assert scores.magnitude(torch.tensor([-(2**53), 2**53 - 1])).diff().item() == -1


def test_magnitude_carries_no_gradient():
    assert not scores.magnitude(torch.ones(3, requires_grad=True)).requires_grad


@given(st.integers(0, 2**31), st.lists(st.integers(0, 4), max_size=3))
def test_random_is_reproducible_from_its_generator(seed, shape):
    def draw():
        return scores.random(
            torch.ones(shape, dtype=torch.cfloat), generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(draw(), draw())
    assert draw().shape == torch.Size(shape)
    assert not draw().is_complex()


def test_random_without_a_generator_draws_from_torchs_own():
    torch.manual_seed(3)
    one, two = scores.random(torch.ones(5)), scores.random(torch.ones(5))
    torch.manual_seed(3)
    assert torch.equal(scores.random(torch.ones(5)), one)
    assert not torch.equal(one, two)


def test_random_scores_lie_where_the_tensor_does():
    assert scores.random(torch.ones(3, device="meta"), generator=torch.Generator()).is_meta
    with torch.device("meta"):
        assert scores.random(torch.ones(3, device="cpu")).is_cpu


def test_lamp_is_its_formula():
    weight = torch.tensor([3.0, -1.0, 0.0, 2.0, 1.0])
    want = []
    for i, w in enumerate(weight.tolist()):
        at_least = [
            v * v
            for j, v in enumerate(weight.tolist())
            if abs(v) > abs(w) or (abs(v) == abs(w) and j <= i)
        ]
        want.append(w * w / sum(at_least))
    torch.testing.assert_close(scores.lamp(weight), torch.tensor(want, dtype=torch.double))
    assert not scores.lamp(torch.zeros(3)).any()
    assert math.isfinite(float(scores.lamp(torch.full((4,), 1e-30)).sum()))


def test_lamp_counts_the_first_of_equal_entries_as_the_largest():
    n = 100_000  # torch sorts few entries stably in any case
    want = 1 / torch.arange(1, n + 1, dtype=torch.double)
    torch.testing.assert_close(scores.lamp(torch.ones(n)), want)


def test_zeros_first_takes_scores_of_any_dtype():
    def zeros_first(found):
        score = scores.zeros_first(lambda tensor, name: found)
        return score(torch.tensor([5.0, 0.0, 4.0]), "w")

    large = zeros_first(torch.tensor([2**24 + 1, 9, 2**24]))
    assert large.tolist() == [2**24 + 1, -math.inf, 2**24]
    assert zeros_first(torch.ones(3, dtype=torch.half)).dtype == torch.half


def test_scores_of_single_entries_say_so():
    assert is_entrywise(scores.entrywise(lambda tensor, name: tensor)) is True
    assert is_entrywise(scores.magnitude) is True
    assert is_entrywise(scores.lamp) is False
