import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasparse.acceleration.formats.format import FORMATS, formats_of
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl

DTYPES = (torch.float32, torch.float64)


@st.composite
def weights(draw):
    """Weights with single, channel-wise or block-wise zeros, two to four dimensions."""
    outputs, inputs = draw(st.sampled_from([(1, 1), (7, 5), (32, 48), (64, 128), (3, 200)]))
    more = draw(st.sampled_from([(), (), (1, 1), (3, 2)]))
    weight = torch.randn(outputs, inputs, *more, dtype=draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(["single", "channels", "blocks", "none", "all"]))
    if kind == "single":
        weight *= torch.rand_like(weight) < draw(st.sampled_from([0.02, 0.1, 0.4]))
    elif kind == "channels":
        weight[torch.rand(outputs) < 0.5] = 0
        weight[:, torch.rand(inputs) < 0.5] = 0
    elif kind == "blocks" and not (outputs % 16 or inputs % 16):
        kept = torch.rand(outputs // 16, inputs // 16) < 0.3
        shape = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
        weight *= shape.view(outputs, inputs, *[1] * len(more))
    elif kind == "all":
        weight.zero_()
    return weight


@given(weights(), st.sampled_from([1, 2, 3, 4, 9, 64, 65, 130]))
def test_each_format_multiplies_as_the_dense_weight_does(weight, n):
    matrix = weight.flatten(1)
    x = torch.randn(n, matrix.shape[1], dtype=weight.dtype)
    bias = torch.randn(len(weight), dtype=weight.dtype)
    for name, made in formats_of(weight, FORMATS).items():
        close = {"rtol": 1e-4, "atol": 1e-4}
        assert torch.equal(made.dense().view_as(weight), weight), name
        if name == "channels" and weight.shape[2:] not in ((), (1, 1)):
            continue  # multiplied by a convolution of their own
        torch.testing.assert_close(made.rows(x, None), x @ matrix.T, **close)
        got = made.rows(x, bias)
        torch.testing.assert_close(got, x @ matrix.T + bias, **close)
        assert got.is_contiguous()
        torch.testing.assert_close(made.columns(x.T), matrix @ x.T, **close)


def test_formats_take_what_suits_them():
    single = torch.where(torch.rand(64, 64) < 0.1, 1.0, 0.0)
    blocks = torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    rows = torch.ones(64, 64)
    rows[::2] = 0
    assert formats_of(single, FORMATS).keys() == {"csr", "bag"}
    assert formats_of(single.double(), FORMATS).keys() == {"csr"}
    assert formats_of(blocks, FORMATS).keys() == {"csr", "bag", "bsr"}
    assert formats_of(rows, FORMATS).keys() == {"csr", "bag", "bsr", "channels"} - {"bsr"}
    assert formats_of(torch.ones(64, 64), FORMATS) == {}
    assert formats_of(single.bfloat16(), FORMATS) == {}
    assert formats_of(single, ["bag"]).keys() == {"bag"}


def test_blocks_are_as_large_as_the_zeros_allow():
    for size in (16, 32, 64):
        weight = torch.eye(4).repeat_interleave(size, 0).repeat_interleave(size, 1)
        weight *= torch.rand_like(weight) + 0.5
        assert formats_of(weight, ["bsr"])["bsr"].blocks.shape == (4, size, size)


def test_csr_and_bag_share_their_tensors():
    made = formats_of(torch.eye(64), ["csr", "bag"])
    both = zip(made["csr"].tensors(), made["bag"].tensors(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in both)


@pytest.mark.parametrize("name", ["csr", "bag"])
def test_groups_are_blocks_of_a_diagonal(name):
    weight = torch.randn(12, 5) * (torch.rand(12, 5) < 0.4)
    made = formats_of(weight, [name])[name]
    for groups in (1, 2, 3, 12):
        want = torch.block_diag(*weight.chunk(groups))
        assert torch.equal(made.diagonal(groups).dense(), want)
    assert made.diagonal(1) is made
    assert made.diagonal(3) is made.diagonal(3)  # made once


@pytest.mark.parametrize("name", ["csr", "bag"])
def test_a_weight_that_is_less_than_half_zeros_is_refused(name):
    weight = torch.ones(8, 8)
    weight[:4] = 0
    assert name in formats_of(weight, [name])
    weight[0, 0] = 1
    assert formats_of(weight, [name]) == {}
