"""Single operators, whose channels stay or go: those that `tests.long.shrink_operators` found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps

INDEX = torch.tensor([[0, 2, 1, 3, 0, 1]])


class Summed(nn.Module):
    """A layer, an operator that may use a parameter of its own, and a weighted sum of the result.

    The operator gets the channels along dimension 0.
    """

    def __init__(self, operator, own, result):
        super().__init__()
        self.operator, self.layer = operator, nn.Linear(3, 6)
        self.own, self.weight = nn.Parameter(torch.randn(own)), nn.Parameter(torch.randn(result))

    def forward(self, x):
        return (self.operator(self.layer(x).movedim(-1, 0), self.own) * self.weight).sum()


# an operator, the shapes of the input but for channels, of the parameter, and of the result
KEPT = {
    "multilabel loss": (lambda h, own: F.multilabel_soft_margin_loss((h * own).t(), INDEX / 3),
                        (1,), (6, 1), ()),
    "grouped convolution": (lambda h, own: F.conv2d(own, h, groups=2), (2, 2, 2), (1, 4, 5, 5),
                            (1, 6, 4, 4)),
    "kl_div": (lambda h, own: F.kl_div(h, own, reduction="batchmean"), (4,), (6, 4), ()),
    "cross_entropy": (lambda h, own: F.cross_entropy(own, (own * h).softmax(1)), (1,), (6, 3), ()),
    "argmax": (lambda h, own: (h * own).argmax().to(h), (4,), (6, 1), ()),
    "rrelu": (lambda h, own: F.rrelu(h - own, training=True), (4,), (6, 1), (6, 4)),
    "split": (lambda h, own: h.split([2, 4, 0])[1] * own, (4,), (4, 1), (4, 4)),
    "unsafe_chunk": (lambda h, own: torch.unsafe_chunk(h, 4)[2] * own, (4,), (2, 4), (2, 4)),
    "reshape_as": (lambda h, own: h.reshape_as(own), (2, 4), (12, 4), (12, 4)),
    "gather": (lambda h, own: (h * own).t().gather(0, INDEX), (4,), (6, 1), (1, 6)),
    "sum_to_size": (lambda h, own: (h * own).sum_to_size(6, 1), (4,), (6, 1), (6, 1)),
    "statistics": (lambda h, own: torch.native_layer_norm(h * own, (4,), None, None, 1.0)[1],
                   (4,), (6, 1), (6, 1)),
    "broadcast and summed": (lambda h, own: torch.broadcast_tensors(h, own)[1].sum(0), (4,), (4,),
                             (4,)),
    "meshgrid": (lambda h, own: torch.meshgrid(h, own, indexing="ij")[1].sum(0), (), (4,), (4,)),
    "cat with an empty tensor": (lambda h, own: torch.cat([own, h.t()]), (4,), (0, 6), (4, 6)),
    "empty linear": (lambda h, own: F.linear(own.t(), own, h), (), (6, 0), (0, 6)),
    "empty product": (lambda h, own: torch.addmm(h, own, own.t()), (6,), (6, 0), (6, 6)),
}  # fmt: skip
CUT = {
    "empty batch": (lambda h, own: (h.t()[4:] * own).sum(0), (4,), (6,), (6,)),
    "repeat": (lambda h, own: h * own.repeat(h.shape[0], 1), (4,), (1, 4), (6, 4)),
    "broadcast_tensors": (lambda h, own: torch.mul(*torch.broadcast_tensors(h, own)), (4,), (4,),
                          (6, 4)),
    "normalize": (lambda h, own: F.normalize(h, dim=0) * own, (4,), (6, 1), (6, 4)),
    "bmm": (lambda h, own: torch.bmm(h.permute(1, 2, 0), own), (2, 4), (2, 6, 5), (2, 4, 5)),
    "baddbmm": (lambda h, own: torch.baddbmm(torch.ones(5, dtype=h.dtype), h.permute(1, 2, 0), own),
                (2, 4), (2, 6, 5), (2, 4, 5)),
}  # fmt: skip


def model_of(case):
    operator, rest, own, result = case
    torch.manual_seed(0)
    return Summed(operator, own, result).double(), torch.randn(*rest, 3).double()


def masked_model(case, *, filters):
    """Drop half of the units, or of the rows of the layer, whose biases become constants."""
    model, x = model_of(case)
    rules = {"layer.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0, norm=2))}
    units = ps.coupled(model, x)
    if not filters and not str(units).startswith("coupled(0 units"):
        rules = units.rules(0.5)
    return ps.sparsify(model, rules), x


@pytest.mark.parametrize("filters", [False, True], ids=["units", "filters"])
@pytest.mark.parametrize("name", [*KEPT, *CUT])
def test_the_smaller_network_computes_the_same(name, filters):
    model, x = masked_model({**KEPT, **CUT}[name], filters=filters)
    plan = ps.plan_shrink(model, x)
    rows = {row.name: row.new_shape for row in plan.rows}
    assert rows.get("layer.weight") == ((3, 3) if name in CUT and not filters else None)
    if rows:
        masked = copy.deepcopy(model)
        ps.shrink(model, x, check=False)
        torch.testing.assert_close(model(x + 1), masked(x + 1))
