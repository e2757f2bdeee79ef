"""Small networks, every subset of their hidden units, and slices written by hand."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps

N = 4  # hidden units


class Residual(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(3, n), nn.Linear(n, 5), nn.Linear(5, n)
        self.head = nn.Linear(n, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.two(self.one(x).relu()))


class Joined(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 2), nn.Linear(3, n), nn.Linear(n + 2, 2)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), self.two(x).tanh()], -1))


class Gated(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.up, self.down = nn.Linear(3, 2 * n), nn.Linear(n, 2)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


def mlp(n):
    return nn.Sequential(nn.Linear(3, n), nn.Tanh(), nn.Linear(n, 2))


def convolutions(n):
    return nn.Sequential(
        nn.Conv2d(3, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 2, 3)
    )


def depthwise(n):
    return nn.Sequential(
        nn.Conv2d(3, n, 1), nn.ReLU(), nn.Conv2d(n, n, 3, groups=n), nn.Conv2d(n, 2, 1)
    )


def flattened(n):
    return nn.Sequential(nn.Conv2d(3, n, 3, bias=False), nn.Flatten(), nn.Linear(4 * n, 2))


NETWORKS = {  # name: builder, dimension and indices of units in tensors, whether inputs are images
    "mlp": (mlp, {"0.weight": 0, "0.bias": 0, "2.weight": 1}, False),
    "convolutions": (
        convolutions,
        dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean",
                       "1.running_var"), 0) | {"3.weight": 1},
        True,
    ),
    "residual": (
        Residual,
        {"stem.weight": 0, "stem.bias": 0, "one.weight": 1, "two.weight": 0, "two.bias": 0,
         "head.weight": 1},
        False,
    ),
    "joined": (
        Joined,
        {"two.weight": 0, "two.bias": 0,
         "head.weight": (1, lambda units: [0, 1, *(2 + u for u in units)])},
        False,
    ),
    "gated": (
        Gated,
        {name: (0, lambda units: [*units, *(N + u for u in units)])
         for name in ("up.weight", "up.bias")} | {"down.weight": 1},
        False,
    ),
    "depthwise": (
        depthwise,
        {"0.weight": 0, "0.bias": 0, "2.weight": 0, "2.bias": 0, "3.weight": 1},
        True,
    ),
    "flattened": (
        flattened,
        {"0.weight": 0,
         "2.weight": (1, lambda units: [4 * u + i for u in units for i in range(4)])},
        True,
    ),
}  # fmt: skip


def places(entry, units):
    """Return the dimension of a tensor that counts units, and the indices of `units` there."""
    dim, indices = entry if isinstance(entry, tuple) else (entry, list)
    return dim, torch.tensor(indices(units), dtype=torch.long)


def built(name):
    torch.manual_seed(0)
    model = NETWORKS[name][0](N).double().eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.2, 1)
    return model


def masked(name, kept):
    """Mask, in every tensor of parameters, what belongs to the other units."""
    model, rules = built(name), {}
    parameters = dict(model.named_parameters())
    for tensor, entry in NETWORKS[name][1].items():
        if tensor in parameters:
            dim, index = places(entry, kept)
            mask = torch.zeros_like(parameters[tensor], dtype=torch.bool)
            rules[tensor] = mask.index_fill_(dim, index, True)
    return ps.sparsify(model, rules)


def sliced(name, kept):
    """Return the smaller network, cut by hand."""
    build, table, _ = NETWORKS[name]
    state = dict(built(name).state_dict())
    for tensor, entry in table.items():
        dim, index = places(entry, kept)
        state[tensor] = state[tensor].index_select(dim, index)
    small = build(len(kept)).double().eval()
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("name", NETWORKS)
def test_every_subset_of_units_gives_the_network_that_is_cut_by_hand(name):
    images = NETWORKS[name][2]
    x = torch.randn(2, 3, 4, 4) if images else torch.randn(2, 3)
    x = x.double()
    for flags in product([True, False], repeat=N):
        kept = [unit for unit in range(N) if flags[unit]]
        model = masked(name, kept)
        want = model(x).detach()
        if len(kept) == N:
            assert not ps.plan_shrink(model, x).rows
            continue
        ps.shrink(model, x)
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-13)
        if kept:
            small = sliced(name, kept)
            torch.testing.assert_close(small(x), want, rtol=1e-12, atol=1e-13)
            assert list(small.state_dict()) == list(model.state_dict())
            pairs = zip(small.state_dict().values(), model.state_dict().values(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
