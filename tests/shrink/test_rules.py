"""Each rule: small modules that do one operation lose channels, or keep them with a reason."""

import copy
import math
import operator
import statistics
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps


class Between(nn.Module):
    """Does `f` to hidden channels (batch, places, channels) between two layers."""

    def __init__(self, f, *, hidden=8, read=None, **attributes):
        super().__init__()
        self.f = f
        for name, value in attributes.items():
            setattr(self, name, value)
        self.one = nn.Linear(5, hidden)
        self.two = nn.Linear(hidden if read is None else read, 3)

    def forward(self, x):
        return self.two(self.f(self, self.one(x)))


def example(batch=2, places=4):
    return torch.randn(batch, places, 5).double()


def zeroed(model, *rows):
    """The first rows of the first layer give 0."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for row in rows:
            model.one.weight[row], model.one.bias[row] = 0, 0
    return model


def attended(self, x):
    """One head, which scales by the size that it sees."""
    return F.scaled_dot_product_attention(x, x, x)


NUMBERS = {
    "scale of attention": attended,
    "int": lambda self, x: x * (1.0 / int(x.shape[-1])),
    "power of an int": lambda self, x: x * int(x.shape[-1]) ** -0.5,
    "bits": lambda self, x: x * x.shape[-1].bit_length(),
    "inverted": lambda self, x: x * ~x.shape[-1],
    "absolute": lambda self, x: x / abs(-x.shape[-1]),
    "rounded": lambda self, x: x / round(x.shape[-1], -1),
    "fraction": lambda self, x: x * float(Fraction(1, x.shape[-1])),
    "square root": lambda self, x: x / math.sqrt(x.shape[-1]),
    "power": lambda self, x: x * x.shape[-1] ** -0.5,
    "mean by hand": lambda self, x: x + x.sum(-1, keepdim=True) / x.shape[-1],
    "attribute": lambda self, x: (x / self.width).view(*x.shape[:2], self.width),
    "tensor": lambda self, x: x / torch.tensor(x.shape[-1]),
    "size times tensor": lambda self, x: x.shape[-1] * x,
    "float": lambda self, x: x * (x.shape[-1] * 0.5),
    "len": lambda self, x: x + x.sum(-1, keepdim=True) / len(x[0, 0]),
    "numel": lambda self, x: x + x.sum(-1, keepdim=True) / x[0, 0].numel(),
    "attribute of a layer": lambda self, x: x / self.one.out_features,
    "filled": lambda self, x: x / torch.full((), x.shape[-1], dtype=x.dtype),
    "compared": lambda self, x: x * (x.new_ones(3) * 7 < x.shape[-1]).sum(),
    "last of a range": lambda self, x: x * torch.arange(x.shape[-1])[-1],
    "mean of a range": lambda self, x: x * torch.linspace(0, 1, x.shape[-1] + 1).square().mean(),
    "strides": lambda self, x: x * x.stride(1),
    "bytes": lambda self, x: x + x.sum(-1, keepdim=True) / x[0, 0].nbytes,
    "where memory starts": lambda self, x: x * x[1].storage_offset(),
    "root of an int": lambda self, x: x * math.isqrt(x.shape[-1] * 9),
    "logarithm": lambda self, x: x * math.log(x.shape[-1]),
    "logarithm of a width": lambda self, x: (
        x * math.log(16, self.width) + x.view(-1, 4, self.width)
    ),
    "common divisor": lambda self, x: x * math.gcd(x.shape[-1], 12),
    "power of two": lambda self, x: x * math.ldexp(1.0, x.shape[-1]),
    "statistics": lambda self, x: x * statistics.mean([x.shape[-1], 2]),
    "repeated list": lambda self, x: x * sum([0.5] * x.shape[-1]),
    "repeated tuple": lambda self, x: x * len(x.shape[-1] * (1,)),
    "complex": lambda self, x: x * abs(x.shape[-1] * 1j),
    "trace": lambda self, x: x * torch.eye(x.shape[-1]).sum(),
}


@pytest.mark.parametrize("f", NUMBERS.values(), ids=NUMBERS)
def test_sizes_from_which_a_number_is_computed_stay(f):
    model = zeroed(Between(f, width=8), 0, 1)
    plan = ps.plan_shrink(model, example())
    assert not plan.rows
    assert all(row.reason for row in plan.kept_back)


SAME_SIZE = (
    abs, round, math.ceil, math.floor, math.trunc, operator.pos,
    operator.methodcaller("conjugate"), operator.attrgetter("real"),
    operator.attrgetter("numerator"),
)  # fmt: skip


@pytest.mark.parametrize("size", SAME_SIZE, ids=str)
def test_sizes_follow_through_functions_that_leave_them_as_they_are(size):
    model = Between(lambda self, x: x.reshape(*x.shape[:2], size(self.width)).tanh(), width=8)
    model, x = zeroed(model, 0, 1), example()
    want = model(x)
    assert ps.shrink(model, x, check=False).width == 6
    torch.testing.assert_close(model(x), want)


def test_a_number_that_python_computes_out_of_sight_is_found_by_the_check():
    """A float on the left asks a size for its value in a way that no subclass of int can see."""
    model = zeroed(Between(lambda self, x: x * (1.0 / x.shape[-1])), 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="a float on the left") as error:
        ps.shrink(model, example())
    line = f"{__file__}:{model.f.__code__.co_firstlineno} gives `mul` 0.142857 instead of 0.125"
    assert line in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_mean_counts_only_if_it_is_used():
    def unused(self, x):
        x.mean(-1)
        return x

    plans = [
        ps.plan_shrink(zeroed(Between(f), 0), example())
        for f in (unused, lambda self, x: x + x.mean(-1, keepdim=True))
    ]
    assert [len(plan.rows) for plan in plans] == [3, 0]


def standardized(self, x):
    """Weights are normalized over their inputs, as in NFNets."""
    w = F.batch_norm(self.two.weight[None], None, None, training=True)[0]
    return F.linear(x, w, self.two.bias)


def test_inputs_over_which_a_weight_is_normalized_stay():
    model = zeroed(Between(standardized, read=8), 0)
    model.two = nn.Identity()
    model.two.weight, model.two.bias = nn.Parameter(torch.randn(3, 8).double()), None
    plan = ps.plan_shrink(model, example())
    assert not plan.rows
    assert "takes a mean or norm" in plan.kept_back[0].reason


def standardized_in_its_shape(self, x):
    """As in timm, which views the weight as one matrix for a batch norm and back."""
    w = self.weight.reshape(1, self.weight.shape[0], -1)
    w = F.batch_norm(w, None, None, training=True)
    return F.linear(x, w.reshape_as(self.weight))


def test_outputs_of_a_weight_that_is_normalized_go():
    model = Between(standardized_in_its_shape, hidden=4)
    model.weight = nn.Parameter(torch.randn(8, 4))
    model.two = nn.Linear(8, 3)
    model, x = model.double(), example()
    masked = copy.deepcopy(ps.sparsify(model, ps.coupled(model, x).rules(0.5)))
    assert ps.shrink(model, x).weight.shape == (4, 4)
    torch.testing.assert_close(model(x + 1), masked(x + 1))


def set_by_number(self, x):
    x = x.clone()
    x[..., 4:] = 1
    return x


STAY = {
    "places set by number": set_by_number,
    "lower triangle": lambda self, x: x.tril(),
    "norm of negative order": lambda self, x: x * torch.linalg.vector_norm(x, -1, -1, True),
    "largest": lambda self, x: x + x.amax(-1, keepdim=True),
    "running sum": lambda self, x: x.cumsum(-1),
    "rolled": lambda self, x: x.roll(1, -1),
    "pooled": lambda self, x: F.avg_pool1d(x, 3, 1, 1),
    "pooled without a batch": lambda self, x: F.avg_pool2d(x.mT, 3, 1, 1).mT,
    "indexed": lambda self, x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]],
    "part by number": lambda self, x: torch.cat([x[..., :4] * 2, x[..., 4:]], -1),
    "sorted": lambda self, x: x.sort(-1)[0],
    "softmax": lambda self, x: x.softmax(-1),
    "variance": lambda self, x: x * x.var(-1, keepdim=True),
    "positions": lambda self, x: x * torch.arange(8.0),
    "as many matrices": lambda self, x: (x.permute(2, 0, 1) @ torch.ones(8, 4, 4).to(x)).permute(
        1, 2, 0
    ),
    "noise": lambda self, x: x + torch.randn_like(x),
    "random places": lambda self, x: F.dropout(x, 0.5, training=True),
    "Fourier": lambda self, x: torch.fft.fft(x).real,
    "real Fourier": lambda self, x: torch.fft.irfft(torch.fft.rfft(x), n=8),
    "Fourier along all": lambda self, x: torch.fft.fftn(x).real,
}


@pytest.mark.parametrize("f", STAY.values(), ids=STAY)
def test_channels_stay_where_their_number_or_place_matters(f):
    plan = ps.plan_shrink(zeroed(Between(f), 0, 1), example())
    assert not plan.rows
    assert all(row.reason for row in plan.kept_back)


def in_complex_numbers(self, x):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * 1j).flatten(-2)


def sampled(self, x):
    image = x.mT.unsqueeze(-1)
    grid = torch.linspace(-0.9, 0.9, 6).view(1, 3, 1, 2).expand(len(x), -1, -1, -1).to(image)
    return F.grid_sample(image, grid, align_corners=False).squeeze(-1).mT


def filtered(self, x):
    """Frequencies are weighted, as in Fourier neural operators and global filters."""
    spectrum = torch.fft.rfft(x, n=2 * x.shape[1], dim=1)
    spectrum = spectrum / (1 + torch.arange(spectrum.shape[1])).view(1, -1, 1)
    return torch.fft.irfft(spectrum, n=2 * x.shape[1], dim=1)[:, : x.shape[1]]


GO = {
    "real and imaginary": in_complex_numbers,
    "Fourier, along places": filtered,
    "complex Fourier, along two dimensions": lambda self, x: (
        torch.fft.fft2(torch.fft.ifft(x, dim=0), dim=(0, 1)).real
    ),
    "norm": lambda self, x: x / x.norm(dim=-1, keepdim=True),
    "sampled": sampled,
    "pooled": lambda self, x: F.max_pool1d(x.mT, 2, 1).mT,
    "flipped": lambda self, x: x.flip(-1) + x.flip(-1),
    "repeated": lambda self, x: x.repeat(1, 2, 1),
    "after an empty part": lambda self, x: torch.cat([x[:, :0], x], 1),
    "whole part": lambda self, x: x[..., :8],
    "part by size": lambda self, x: x[..., : x.shape[-1]],
}


@pytest.mark.parametrize("f", GO.values(), ids=GO)
def test_channels_go_through(f):
    model = zeroed(Between(f), 0, 1, 2, 3)
    reference = copy.deepcopy(model)
    ps.shrink(model, example())
    assert model.one.out_features == 4
    x = example(3)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dead", [(0, 1), (0, 1, 2), (0, 1, 2, 3), (4,), (0, 1, 2, 5)], ids=str)
def test_the_rest_of_a_split_is_one_piece(dead):
    rest = lambda self, x: x.split(self.at, -1)[-1]  # noqa: E731
    model = zeroed(Between(rest, hidden=6, read=2, at=4), *dead)
    reference = copy.deepcopy(model)
    if ps.plan_shrink(model, example()).rows:
        ps.shrink(model, example())
    x = example(3)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)


def expanded(self, x):
    """A parameter gets the sizes of a tensor that it does not meet."""
    return torch.cat([x, self.two.weight[:1, 8:].expand_as(x)], -1)


FEW = {  # one channel is left
    "expanded like another": (expanded, 16),
    "pixel shuffle": (lambda self, x: (F.pixel_shuffle(x.mT.unsqueeze(-1), 2), x)[1], 8),
    "channel shuffle": (lambda self, x: F.channel_shuffle(x.mT.unsqueeze(-1), 2)[..., 0].mT, 8),
    "parameters put together": (lambda self, x: (torch.cat([self.two.bias] * 2), x)[1], 8),
    "squeezed": (lambda self, x: x.unsqueeze(1).squeeze(), 8),
    "halves": (lambda self, x: (x.split(x.shape[-1] // 2, -1), x)[1], 8),
    "second half": (lambda self, x: x + x[..., x.shape[-1] // 2 :].amax(-1, True), 8),
}


@pytest.mark.parametrize("name", FEW)
def test_programs_run_with_few_channels(name):
    f, read = FEW[name]
    model = zeroed(Between(f, read=read), *range(7))
    reference = copy.deepcopy(model)
    if ps.plan_shrink(model, example()).rows:
        ps.shrink(model, example())
    x = example(3)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)


class Token(nn.Module):
    """Puts a parameter in front of the places, as a vision transformer does."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x):
        hidden = self.one(x)
        return self.two(torch.cat([self.token.expand(len(x), -1, -1), hidden], dim=1))


def test_a_token_in_front_of_the_places_loses_channels():
    model = zeroed(Token(), 0, 1)
    with torch.no_grad():
        model.token[..., :2] = 0
    x = example(3)
    want = copy.deepcopy(model)(x)
    torch.testing.assert_close(ps.shrink(model, example())(x), want)
    assert model.token.shape == (1, 1, 6)


class Kronecker(nn.Module):
    """A layer whose weight is a Kronecker product."""

    def __init__(self, product):
        super().__init__()
        self.one, self.two, self.product = nn.Linear(5, 8), nn.Linear(6, 3), product
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return self.product(self, self.one(x).tanh())


def convolved(self, x):
    w = torch.kron(self.a[..., None], self.b[..., None])
    return F.conv1d(x.mT, w).mT


def scaled(self, x):
    return self.two(F.linear(x * torch.kron(self.a[0], self.b[0]), torch.kron(self.a, self.b)))


KRONECKER = {
    "linear": lambda self, x: self.two(F.linear(x, torch.kron(self.a, self.b))),
    "convolution": lambda self, x: self.two(convolved(self, x).tanh()),
    "an output": convolved,
    "scaled": scaled,
}


@pytest.mark.parametrize("product", KRONECKER.values(), ids=KRONECKER)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_units_of_a_kronecker_product_can_be_removed(product, share):
    model, x = Kronecker(product).double().eval(), example()
    units = ps.coupled(model, x)
    reached = {n: torch.rand_like(p) for n, p in model.named_parameters()
               if units.reaches(n, model, p)}  # fmt: skip
    if product is scaled:  # two factors meet the channels of one layer
        assert not reached
        return
    ps.sparsify(model, units.jointly(reached, share))
    plan = ps.plan_shrink(model, x)
    assert not plan.kept_back
    want = model(x)
    if plan.rows:
        ps.shrink(model, x)
    torch.testing.assert_close(model(x), want)
