"""Values that a plan does not need are not computed, and nobody sees the difference."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.shrink.running import traced
from parasparse.targets.tensors import tensors_of

READS = {
    "item": lambda h: h[0, 0].item(),
    "float": lambda h: float(h.sum()),
    "bool": lambda h: bool((h > 0.1).any()),
    "tolist": lambda h: h.tolist()[0][0],
    "numpy": lambda h: float(h.numpy()[0, 0]),
    "equal": lambda h: torch.equal(h, h.round()),
    "nonzero": lambda h: len(h.clamp(min=0.1).sub(0.1).nonzero()),
    "bool index": lambda h: len(h[h > 0.1]),
    "masked_select": lambda h: len(h.masked_select(h > 0.1)),
    "unique": lambda h: len(h.round().unique()),
    "data_ptr": lambda h: h.clone().data_ptr() > 0 and float(h.sum()),
}
WRITES = {
    "in place": lambda weight: weight.mul_(2.0),
    "a part": lambda weight: weight[1:].zero_(),
    "data": lambda weight: weight.data.clamp_(max=0.0),
    "new data": lambda weight: setattr(weight, "data", weight.data * 2.0),
    "out": lambda weight: torch.add(weight, 1.0, out=weight),
    "copy_": lambda weight: weight.copy_(torch.ones_like(weight)),
}


WEIGHT_READS = {
    "sum": lambda weight: float(weight.sum()),
    "view": lambda weight: float(weight.t().flatten()[:20].sum()),
    "data": lambda weight: float(weight.data.abs().sum()),
    "deepcopy": lambda weight: float(copy.deepcopy(weight).sum()),
    "numpy": lambda weight: float(weight.detach().numpy().sum()),
    "product": lambda weight: float((weight @ weight.t()).sum()),
    "embedding": lambda weight: float(nn.functional.embedding(torch.tensor([1, 5]), weight).sum()),
}


class Watched(nn.Module):
    """Two layers; `use` gets what the first one gives and its weight."""

    def __init__(self, use):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.use = use

    def forward(self, x):
        h = self.first(x)
        self.use(h, self.first.weight)
        return self.last(h.relu())


def half(model):
    rule = ps.Prune(0.5, pattern=ps.patterns.channel(0))
    return ps.sparsify(model.eval(), {"first": rule})


def watched(read):
    """Return what `read(h, weight)` returns in a call, and in the runs of plans."""
    seen = []
    model = half(Watched(lambda h, weight: seen.append(read(h, weight))))
    x = torch.randn(4, 6)
    with torch.no_grad():
        model(x)
    (want,) = seen
    seen.clear()
    ps.plan_shrink(model, x)
    ps.coupled(model, x)
    return want, seen


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_program_that_reads_a_value_reads_the_right_one(read):
    want, seen = watched(lambda h, weight: read(h))
    assert [type(want)(value) for value in seen] == pytest.approx([want, want])


@pytest.mark.parametrize("read", WEIGHT_READS.values(), ids=WEIGHT_READS)
def test_a_program_that_reads_a_masked_weight_reads_its_values(read):
    want, seen = watched(lambda h, weight: read(weight))
    assert len(seen) >= 2
    assert seen == pytest.approx([want] * len(seen))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("masked", [True, False])
def test_a_program_that_writes_into_a_parameter_does_not_change_the_model(write, masked):
    model = Watched(lambda h, weight: write(weight)).eval()
    model = half(model) if masked else model
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        ps.plan_shrink(model, torch.randn(2, 6))
        ps.coupled(model, torch.randn(2, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_products_whose_values_nobody_reads_are_not_computed():
    results = []
    model = half(Watched(lambda h, weight: results.append(h)))
    x = torch.randn(4, 6)
    trace, _, _ = traced(model, tensors_of(model, pairs=False), x, {})
    (h,) = results
    assert trace.stand_ins.made
    want = ps.squash(copy.deepcopy(model)).first(x)
    assert h.shape == want.shape
    assert h.stride() == want.stride()
    assert not torch.allclose(h, want)


@pytest.mark.parametrize("masked", [True, False])
def test_an_embedding_refuses_what_is_no_row(masked):
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model = ps.sparsify(model, {"1": ps.Prune(0.5, pattern=ps.patterns.channel(0))})
    if masked:
        model = ps.sparsify(model, {"0": ps.Prune(0.5, pattern=ps.patterns.channel(1))})
    assert ps.plan_shrink(model, torch.tensor([[0, 5]])).rows
    for index in (-1, 6):
        with pytest.raises(IndexError, match="out of range"):
            ps.plan_shrink(model, torch.tensor([[0, index]]))
