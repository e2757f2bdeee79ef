import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse import scores


def test_magnitude_is_the_modulus_of_complex_entries():
    tensor = torch.tensor([3 + 4j, -1j])
    assert scores.magnitude(tensor).tolist() == [5.0, 1.0]


@pytest.mark.parametrize(
    "dtype", [torch.half, torch.bfloat16, torch.double, torch.float8_e4m3fn], ids=str
)
def test_magnitude_ranks_every_dtype(dtype):
    tensor = torch.tensor([-2.0, 0.5, 1.0]).to(dtype)
    assert scores.magnitude(tensor).float().tolist() == [2.0, 0.5, 1.0]


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
