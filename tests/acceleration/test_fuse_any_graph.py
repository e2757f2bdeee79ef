"""Fused networks of any graph compute what the networks do, and change no other tensor."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from tests.acceleration.test_accelerate import close
from tests.acceleration.test_accelerate import pytestmark as pytestmark  # marks these tests too


def added_in_place(x, y):
    x += y
    return x


SUMS = [lambda x, y: x + y, torch.add, added_in_place, lambda x, y: y + x.mean((2, 3), True)]
ACTIVATIONS = [
    *(kind(inplace) for kind in (nn.ReLU, nn.ReLU6, nn.Hardswish) for inplace in (False, True)),
    *(F.relu, torch.relu_, F.hardsigmoid, lambda x: x.relu_(), lambda x: F.hardswish(x, True)),
]
OTHERS = [lambda x: x[:, :], lambda x: 0.5 * x, nn.MaxPool2d(3, 1, 1), nn.Identity()]


class Graph(nn.Module):
    """Each step takes one or two of the last values, and adds its own to them."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(
            nn.Conv2d(4, 4, k, padding=k // 2, groups=g) for k, g in ((1, 1), (3, 1), (3, 4))
        )
        self.calls = nn.ModuleList(f for f in (*ACTIVATIONS, *OTHERS) if isinstance(f, nn.Module))

    def forward(self, x):
        values = [x]
        for call, *back in self.steps:
            taken = [values[-min(n, len(values))] for n in back]
            values.append(self.layers[call](*taken) if isinstance(call, int) else call(*taken))
        return values[-3:]


BACK = st.integers(1, 3)
LAYER = st.tuples(st.integers(0, 2), BACK)
SUM = st.tuples(st.sampled_from(SUMS), BACK, BACK)
ACTIVATION = st.tuples(st.sampled_from(ACTIVATIONS), st.just(1))
STEP = st.one_of(LAYER, SUM, ACTIVATION, st.tuples(st.sampled_from(OTHERS), BACK))
# Layers with sums and activations directly after them, and anything in between.
PARTS = st.lists(
    st.one_of(
        st.tuples(LAYER, SUM, ACTIVATION), st.tuples(LAYER, LAYER, SUM), STEP.map(lambda s: (s,))
    ),
    min_size=1,
    max_size=5,
)


@given(parts=PARTS, batch=st.integers(0, 2), seed=st.integers(0, 99))
@torch.no_grad()
def test_outputs_are_those_of_the_network(parts, batch, seed):
    torch.manual_seed(seed)
    model = Graph([step for part in parts for step in part]).eval()
    for layer in model.layers:
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    x = torch.randn(batch, 4, 5, 6)
    changed = x.clone()
    want = [value.clone() for value in model(changed)]
    fused = ps.fuse(model)
    plan = {name: [[1, "compiled"]] for name, t in fused.named_parameters() if t.ndim == 4}
    fast = ps.accelerate(copy.deepcopy(fused), formats=plan) if plan else fused
    for one in (fused, fast):
        given_ = x.clone()
        found = one(given_)
        close((given_, found), (changed, want))
        kept = [value.clone() for value in found]
        one(x.clone())
        close(found, kept)
