"""Rows of the dense gradient come from the recorded uses of a compact weight."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import parasparse as ps
from parasparse.acceleration.compact.uses import recorded
from parasparse.targets.reach import masked_targets
from tests.acceleration.cases import CASES
from tests.helpers.machine import needs_mkl

pytestmark = [
    needs_mkl,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


class Conv1D(nn.Module):
    """Multiplies as the layer of that name in transformers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 48))

    def forward(self, x):
        return torch.addmm(torch.zeros(48, dtype=x.dtype), x, self.weight)


MORE = {
    "transposed": (Conv1D, (torch.randn(5, 32),)),
    "complex": (lambda: nn.Linear(8, 6, dtype=torch.complex64), (torch.randn(3, 8) + 0j,)),
}


def backward(model, inputs):
    for _ in range(2):  # gradients accumulate
        sum(t.abs().square().sum() for t in tree_leaves(model(*inputs)) if t is not None).backward()


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_rows_of_the_gradient_are_those_of_the_masked_model(name):
    build, inputs = {**CASES, **MORE}[name]
    torch.manual_seed(0)
    rules = {"embedding.weight": 0.8} if name == "tied" else 0.8
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    masked = ps.sparsify(build().eval(), rules)
    for parameter in masked.parameters():
        parameter.data = parameter.data.to(wide.get(parameter.dtype, parameter.dtype))
    inputs = tree_map(lambda t: t.to(wide.get(t.dtype, t.dtype)), inputs)
    compact = ps.compact(copy.deepcopy(masked))
    with ps.dense_gradients(masked) as wanted:
        torch.manual_seed(0)
        backward(masked, inputs)
    for target in masked_targets(compact):
        with recorded([site.stack() for site in target.sites]) as uses:
            torch.manual_seed(0)
            backward(compact, inputs)
        assert all(site.stack().recorder is None for site in target.sites)
        want = wanted[target.name].flatten(1)
        step = max(1, len(want) // 3)
        for start in range(0, len(want), step):
            block = torch.zeros_like(want[start : start + step])
            uses.add_rows(start, start + len(block), block)
            torch.testing.assert_close(block, want[start : start + step], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_are_recorded_once(use_reentrant):
    model = ps.compact(ps.sparsify(nn.Linear(6, 5).double(), 0.5))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    blocks = []
    (target,) = masked_targets(model)
    for checkpointed in (False, True):
        with recorded([site.stack() for site in target.sites]) as uses:
            y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
            y.square().sum().backward()
        blocks.append(torch.zeros(5, 6, dtype=torch.float64))
        uses.add_rows(0, 5, blocks[-1])
    torch.testing.assert_close(*blocks)
