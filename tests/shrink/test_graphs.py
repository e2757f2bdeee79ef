"""Graph networks: messages along edges, gathered at nodes, with attention of several heads."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps


def spread(index, like):
    """The index of each message, for all of its entries."""
    return index.view(-1, *[1] * (like.dim() - 1)).expand(like.size())


def zeros(messages, number):
    return messages.new_zeros((number, *messages.size()[1:]))


GATHER = {
    "scatter_add": lambda m, i, n: zeros(m, n).scatter_add_(0, spread(i, m), m),
    "index_add": lambda m, i, n: zeros(m, n).index_add_(0, i, m),
    "index_put": lambda m, i, n: zeros(m, n).index_put_((i,), m, accumulate=True),
    "zeros of its sizes": lambda m, i, n: torch.zeros(n, *m.shape[1:]).to(m).index_add(0, i, m),
}


class GraphAttention(nn.Module):
    """The layer of the paper (1710.10903): each head weighs the neighbours of a node."""

    def __init__(self, size, heads, width, gather):
        super().__init__()
        self.heads, self.width, self.gather = heads, width, gather
        self.project = nn.Linear(size, heads * width, bias=False)
        self.source, self.target = (
            nn.Parameter(torch.randn(1, heads, width)) for _ in range(2)
        )  # fmt: skip
        self.bias = nn.Parameter(torch.randn(heads * width))

    def forward(self, x, edges):
        h = self.project(x).view(-1, self.heads, self.width)
        source, target = ((h * a).sum(-1) for a in (self.source, self.target))
        scores = nn.functional.leaky_relu(source[edges[0]] + target[edges[1]], 0.2).exp()
        total = self.gather(scores, edges[1], len(x)) + 1e-16
        weights = scores / total[edges[1]]
        messages = h[edges[0]] * weights.unsqueeze(-1)
        gathered = self.gather(messages, edges[1], len(x))
        return gathered.view(-1, self.heads * self.width) + self.bias


class Net(nn.Module):
    def __init__(self, gather):
        super().__init__()
        self.one = GraphAttention(5, 4, 3, gather)
        self.two = GraphAttention(12, 4, 2, gather)
        self.three = nn.Linear(8, 3)

    def forward(self, x, edges):
        return self.three(self.two(self.one(x, edges).relu(), edges).relu())


@pytest.mark.parametrize("gather", GATHER.values(), ids=GATHER)
def test_heads_of_graph_attention_go(gather):
    torch.manual_seed(0)
    model = Net(gather).double().eval()
    example = torch.randn(6, 5).double(), torch.randint(6, (2, 15))
    ps.sparsify(model, ps.coupled(model, example).rules(0.5))
    masked = copy.deepcopy(model)
    ps.shrink(model, example)
    assert (model.one.heads, model.one.width) == (2, 3)
    assert model.two.project.weight.shape == (4, 6)
    others = torch.randn(9, 5).double(), torch.randint(9, (2, 40))
    for inputs in (example, others):
        torch.testing.assert_close(model(*inputs), masked(*inputs), rtol=1e-10, atol=1e-12)
