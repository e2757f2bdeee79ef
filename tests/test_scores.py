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
