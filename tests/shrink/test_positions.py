"""Heads go where all of them use one tensor, such as keys of positions, or pick from their own."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.shrink.test_shrink import assert_same


def summed(q, keys, places):
    """Keys of relative positions (1803.02155), which all heads share."""
    return torch.einsum("bhtd,tsd->bhts", q, keys[places])


def batched(q, keys, places):
    b, h, t, d = q.shape
    product = q.permute(2, 0, 1, 3).reshape(t, -1, d) @ keys[places].transpose(1, 2)
    return product.view(t, b, h, t).permute(1, 2, 0, 3)


def transposed(q, keys, places):
    b, h, t, d = q.shape
    product = keys[places] @ q.permute(2, 3, 0, 1).reshape(t, d, -1)
    return product.view(t, t, b, h).permute(2, 3, 0, 1)


def gathered(index):
    """Products with all positions, of which an index picks those needed (2006.03654)."""

    def scores(q, keys, places):
        products = q @ keys.t()
        return products.gather(-1, index(places, products))

    return scores


SCORES = {
    "einsum": summed,
    "batched": batched,
    "transposed": transposed,
    "expand": gathered(lambda i, like: i.expand(*like.shape[:2], -1, -1)),
    "expand by sizes": gathered(lambda i, like: i.expand(like.size(0), like.size(1), *i.shape)),
    "repeat": gathered(lambda i, like: i.repeat(like.size(0), like.size(1), 1, 1)),
}


class Relative(nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.heads, self.scores = 4, scores
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.keys = nn.Parameter(torch.randn(21, 2))

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        place = torch.arange(length)
        scores = self.scores(q, self.keys, place.unsqueeze(1) - place + 10)
        weights = (q @ k.transpose(-1, -2) + scores).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_heads_go_and_the_keys_of_positions_stay(scores):
    torch.manual_seed(0)
    model, x = Relative(scores).double(), torch.randn(2, 5, 8).double()
    ps.sparsify(model, ps.coupled(model, x).rules(0.5))
    masked = copy.deepcopy(model)
    ps.shrink(model, x)
    assert model.heads == 2
    assert model.keys.shape == (21, 2)
    assert not list(ps.named_masks(model))
    assert_same(model, masked, x, torch.randn(3, 9, 8).double())


class Picking(nn.Module):
    """Places are picked in each channel, by an index that is stored."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)
        self.register_buffer("index", torch.randint(5, (8, 4)))

    def forward(self, x):
        return self.after(self.before(x).gather(2, self.index.expand(len(x), -1, -1)))


def test_channels_stay_of_which_a_stored_index_picks():
    torch.manual_seed(0)
    model, x = Picking(), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="no channel of the model can be removed: .*picked by"):
        ps.coupled(model, x).rules(0.5)
    ps.sparsify(model, {"before": ps.Prune(0.5, pattern=ps.patterns.channel(0, norm=2))})
    (kept,) = (row for row in ps.plan_shrink(model, x).kept_back if row.name == "before.weight")
    assert "picked by indices (gather)" in kept.reason
