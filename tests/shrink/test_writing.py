"""What is written at indices: experts, graphs, and buffers that a program fills."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps


def gathered(x, index):
    """Sums over the neighbours in a graph, as an operation out of place and in place."""
    out = torch.zeros_like(x).index_add(0, index, x)
    return out.index_add_(0, index.flip(0), x)


GO = {
    "index_add": gathered,
    "index_copy": lambda x, i: x.clone().index_copy(0, i, x.flip(0)),
    "scatter_add": lambda x, i: torch.zeros_like(x).scatter_add(
        0, i[:, None].expand(-1, x.shape[1]), x
    ),
    "scatter": lambda x, i: torch.zeros_like(x).scatter_(0, i[:, None].expand_as(x), x),
    "scatter_reduce": lambda x, i: x.new_zeros(x.shape).scatter_reduce(
        0, i[:, None].expand_as(x), x, "amax"
    ),
    "rows": lambda x, i: x.clone().index_put((i,), x.flip(0)),
    "a mask of rows": lambda x, i: x.new_zeros(x.shape).index_put((i < 2,), x[i < 2]),
    "added to rows": lambda x, i: x.clone().index_put((i,), x, accumulate=True),
    "entries of all": lambda x, i: x * (i > 1)[:, None].expand(-1, x.shape[1]),
}
STAY = {
    "a number": lambda x, i: x.clone().index_fill(0, i, 3.0) * 1,
    "places of channels": lambda x, i: x.clone().index_add(1, i, x[:, : len(i)]),
    "by index of channels": lambda x, i: x.clone().index_put((i, i), x[0, 0]),
}


class Graph(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, index):
        return self.two(self.f(self.one(x), index))


def dead(f):
    torch.manual_seed(0)
    model = Graph(f).double().eval()
    with torch.no_grad():
        model.one.weight[:4], model.one.bias[:4] = 0, 0
    return model, (torch.randn(4, 5).double(), torch.tensor([0, 2, 1, 2]))


@pytest.mark.parametrize("f", GO.values(), ids=GO)
def test_channels_that_are_written_go(f):
    model, example = dead(f)
    reference = copy.deepcopy(model)
    ps.shrink(model, example)
    assert model.one.out_features == 4
    inputs = torch.randn(5, 5).double(), torch.tensor([3, 0, 2, 4, 1])
    torch.testing.assert_close(model(*inputs), reference(*inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("f", STAY.values(), ids=STAY)
def test_channels_stay_where_a_number_or_their_place_is_written(f):
    model, example = dead(f)
    plan = ps.plan_shrink(model, example)
    assert not plan.rows
    assert all(row.reason for row in plan.kept_back)


class Experts(nn.Module):
    """Tokens are sent to experts, of which many get none."""

    def __init__(self, put, number=6):
        super().__init__()
        self.put = put
        self.router = nn.Linear(5, number)
        self.up = nn.ModuleList(nn.Linear(5, 8) for _ in range(number))
        self.down = nn.ModuleList(nn.Linear(8, 5) for _ in range(number))

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            (rows,) = torch.where(chosen == number)
            hidden = up(x[rows]).relu()
            self.put(out, rows, down(hidden + hidden.mean(0)) * 2)
        return out


PUTS = {
    "added": lambda out, rows, y: out.index_add_(0, rows, y),
    "set": lambda out, rows, y: out.index_put_((rows,), y),
}


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_experts_that_get_no_tokens_lose_channels_too(put):
    torch.manual_seed(0)
    model = Experts(put).double().eval()
    example = torch.randn(2, 5).double()
    units = ps.coupled(model, example)
    masked = copy.deepcopy(ps.sparsify(model, units.rules(0.5)))
    ps.shrink(model, example)
    assert {up.out_features for up in model.up} == {4}
    x = torch.randn(40, 5).double()
    torch.testing.assert_close(model(x), masked(x), rtol=1e-10, atol=1e-12)


class Fused(nn.Module):
    """The weights of all experts are one tensor each, and every expert is computed."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.up = nn.Parameter(torch.randn(3, 5, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x):
        hidden = torch.einsum("nc,ecf->nef", x, self.up).relu()
        return torch.einsum("nef,efc,ne->nc", hidden, self.down, self.router(x).softmax(-1))


def test_experts_in_one_tensor_lose_inner_channels():
    torch.manual_seed(0)
    model = Fused().double().eval()
    example = torch.randn(2, 5).double()
    units = ps.coupled(model, example)
    masked = copy.deepcopy(ps.sparsify(model, units.rules(0.5)))
    ps.shrink(model, example)
    assert model.up.shape == (3, 5, 4)
    x = torch.randn(9, 5).double()
    torch.testing.assert_close(model(x), masked(x), rtol=1e-10, atol=1e-12)
    assert not ps.plan_shrink(model, example).rows


class Hit(nn.Module):
    """Experts in one tensor, of which only those run that get a token."""

    def __init__(self, pick):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 4))
        self.down = nn.Parameter(torch.randn(4, 4, 8))
        self.pick = pick

    def forward(self, x, expert):
        out = torch.zeros_like(x)
        for each in expert.unique():
            (rows,) = torch.where(expert == each)
            up, down = self.pick(self.up, each), self.pick(self.down, each)
            out.index_add_(0, rows, F.linear(F.linear(x[rows], up).relu(), down))
        return out


PICKS = {
    "by a number": lambda w, e: w[int(e)],
    "by an index": lambda w, e: w[e],
    "by a list": lambda w, e: w[e[None]][0],
    "unbound": lambda w, e: w.unbind(0)[int(e)],
    "of a view": lambda w, e: w.view(2, 2, *w.shape[1:])[int(e) // 2, int(e) % 2],
}


@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS)
def test_experts_that_the_example_does_not_hit_keep_their_channels(pick):
    """The example hits experts alone that a mask drops as a whole."""
    torch.manual_seed(0)
    model = Hit(pick).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    first = torch.zeros(6, dtype=torch.long)
    kept = torch.ones(4, 8, dtype=torch.bool)
    kept[0] = False
    kept[:, :3] = False
    ps.sparsify(model, {"up": kept[:, :, None].expand(4, 8, 4)})
    masked = ps.squash(copy.deepcopy(model))
    ps.shrink(model, (x, first))
    assert model.up.shape[:2] == (4, 5)
    for experts in (first, torch.tensor([0, 1, 2, 3, 1, 1])):
        torch.testing.assert_close(model(x, experts), masked(x, experts), rtol=1e-12, atol=1e-12)


def test_whole_experts_are_no_units():
    torch.manual_seed(0)
    model, x = Hit(PICKS["by a number"]).double(), torch.randn(6, 4, dtype=torch.float64)
    example = (x, torch.tensor([0, 1, 1, 1, 0, 1]))
    units = ps.coupled(model, example)
    ps.sparsify(model, units.rules(0.5))
    kept = ps.mask_of(model, "up").any(-1)
    assert kept.all(0).sum() == 4
    assert (kept == kept[:1]).all()


class Convolved(nn.Module):
    """A graph whose neighbours are a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, neighbours):
        hidden = torch.sparse.mm(neighbours, self.one(x))
        return self.three(F.relu(self.two(hidden)))


def test_a_sparse_input_keeps_the_channels_that_it_meets():
    torch.manual_seed(0)
    model = Convolved().double().eval()
    example = torch.randn(4, 5).double(), torch.eye(4).double().roll(1, 0).to_sparse()
    units = ps.coupled(model, example)
    masked = copy.deepcopy(ps.sparsify(model, units.rules(0.5)))
    ps.shrink(model, example)
    assert (model.one.out_features, model.two.out_features) == (8, 3)
    torch.testing.assert_close(model(*example), masked(*example), rtol=1e-10, atol=1e-12)
