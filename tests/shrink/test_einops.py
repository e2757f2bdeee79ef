"""Programs that reshape with einops, which keeps the shapes that it has computed."""

import copy

import einops
import pytest
import torch
from einops.layers.torch import Rearrange
from torch import nn

import parasparse as ps

pytestmark = pytest.mark.skipif(
    not hasattr(einops.einops, "_reconstruct_from_shape"),
    reason="this version of einops keeps no shapes, or elsewhere",
)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, 0.5
        self.qkv, self.out = nn.Linear(width, 3 * 8 * heads), nn.Linear(8 * heads, width)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in parts)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out(einops.rearrange(weights @ v, "b h n d -> b n (h d)"))


class Net(nn.Module):
    """Patches, two layers of attention that have the same shapes, and a mean."""

    def __init__(self):
        super().__init__()
        patches = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        self.patches = nn.Sequential(patches, nn.Linear(12, 16))
        self.layers = nn.ModuleList(Attention(16, 4) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x)
        for layer in self.layers:
            x = x + layer(x)
        x = x + self.mlp(x)
        return self.head(einops.reduce(x, "b n d -> b d", "mean"))


def test_heads_of_einops_go():
    torch.manual_seed(0)
    model = Net().double().eval()
    x = torch.randn(2, 3, 8, 8).double()
    for share, heads in ((0.5, 2), (0.5, 1)):  # again: with the shapes of another run at hand
        model(x)
        ps.sparsify(model, ps.coupled(model, x).rules(share))
        masked = copy.deepcopy(model)
        ps.shrink(model, x)
        assert [layer.heads for layer in model.layers] == [heads, heads]
        for each in (x, torch.randn(3, 3, 4, 6).double()):
            torch.testing.assert_close(model(each), masked(each), rtol=1e-10, atol=1e-12)
    assert model.mlp[0].out_features == 5


def test_einops_keeps_its_shapes_again_afterwards():
    cached = einops.einops._reconstruct_from_shape
    ps.coupled(Net(), torch.randn(1, 3, 4, 4))
    assert einops.einops._reconstruct_from_shape is cached
    assert hasattr(cached, "cache_info")
