"""What a run calls known does not depend on the input, and what nobody needs has no effect."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.shrink.facts import UNKNOWN, ZERO
from parasparse.shrink.labels import compact
from parasparse.shrink.needed import keep_needed
from parasparse.shrink.norms import Norms
from parasparse.shrink.readers import readers_of
from parasparse.shrink.running import masked_states, traced
from parasparse.shrink.units import Units
from parasparse.targets.tensors import tensors_of

WIDTH = 6


class Sum(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x):
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    """Over the places of an image."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(WIDTH, WIDTH, *args, **kwargs)


def halves():
    return nn.Sequential(nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.GLU(1))


LAYERS = {  # from WIDTH channels to as many
    "padded": conv(3, padding=1, bias=False),
    "pointwise": conv(1),
    "pointwise without bias": conv(1, bias=False),
    "depthwise": conv(3, padding=1, groups=WIDTH),
    "grouped": conv(3, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "instance norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "prelu": lambda: nn.PReLU(WIDTH),
    "average pool": lambda: nn.AvgPool2d(3, 1, padding=1),
    "max pool": lambda: nn.MaxPool2d(3, 1, padding=1),
    "upsample": lambda: Call(lambda x: F.interpolate(x, scale_factor=2)[..., ::2, ::2]),
    "dropout": nn.Dropout,
    "glu": halves,
    "gate": Gate,
    "attention": Attention,
    "square": lambda: Call(lambda x: x * x),
    "where": lambda: Call(lambda x: torch.where(x > 0, x, 0.1)),
    "softmax": lambda: Call(lambda x: x.flatten(2).softmax(-1).view(x.shape)),
    "cumsum": lambda: Call(lambda x: x.cumsum(-1)),
    "normalized": lambda: Call(lambda x: F.normalize(x, dim=2)),
    "roll": lambda: Call(lambda x: x.roll(1, -1)),
    "cat": lambda: Call(lambda x: torch.cat([x[:, :2], x[:, 2:]], 1)),
    "scaled by a number": lambda: Call(lambda x: x * x.abs().max().item()),
    "residual": lambda: Sum(nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1))),
}


def network(names, seed):
    """A masked network: random filters are dropped, some with their biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers = [LAYERS[name]() for name in names]
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), *layers, nn.Conv2d(WIDTH, 3, 1)).double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 - 0.8)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_().add_(0.1)
    rules = {}
    last = f"{len(model) - 1}."
    for name, tensor in model.named_parameters():
        kept = torch.rand(tensor.shape[:1], generator=generator) > 0.5
        kept[0] = True
        share = 0.7 if tensor.ndim > 1 else 0.3
        if not name.startswith(last) and torch.rand((), generator=generator) < share:
            shape = (-1, *[1] * (tensor.ndim - 1))
            rules[name] = ps.Fixed(kept.view(shape).expand(tensor.shape).clone())
    return ps.sparsify(model, rules or {"0.weight": 0.5})


def images(batch, size, scale=1.0):
    return scale * (2 * torch.rand(batch, 3, size, size, dtype=torch.double) - 1)


def collecting(model):
    """Collect the outputs of modules; copies of the model collect in the same list."""
    found = []

    def collect(module, args, out):
        if isinstance(out, torch.Tensor):
            found.append(out)

    for module in model.modules():
        if not isinstance(module, ps.Mask):
            module.register_forward_hook(collect)
    return found


def assert_known_values_stay(model, size, inputs):
    model = copy.deepcopy(model)
    masked = masked_states(tensors_of(model, pairs=False))
    model = ps.squash(model)
    found = collecting(model)
    example = images(2, size)
    trace, _, _ = traced(model, tensors_of(model, pairs=False), example, masked)
    run = [(out, trace.state(out)) for out in found]
    for _ in range(inputs):
        found.clear()
        with torch.no_grad():
            model(images(2, size, 1e3))
        # A run that was given up, because the program read a value, has left outputs as well.
        for (value, state), other in zip(run[-len(found) :], found, strict=True):
            known = state != UNKNOWN
            torch.testing.assert_close(other[known], value[known], rtol=1e-9, atol=1e-12)
            assert not bool(other[state == ZERO].any())


def assert_unneeded_is_unneeded(model, size):
    tensors = tensors_of(model, pairs=False)
    masked = masked_states(tensors)
    trace, _, _ = traced(model, tensors, images(2, size), masked)
    units, readers = Units(trace), readers_of(trace, masked)
    keep_needed(trace, units, readers, Norms(trace, units, masked), exact=True)
    idle = ~units.kept
    for reader in readers:  # constants that are folded are needed
        columns = reader.read.columns.expand_as(reader.needed(units))
        idle[units.of[columns[reader.needed(units)]]] = False
    model = ps.squash(copy.deepcopy(model))
    x = images(2, size)
    noisy = copy.deepcopy(model)
    tensors = dict(noisy.named_parameters())
    with torch.no_grad():
        for leaf in trace.leaves.values():
            for label in leaf.labels if leaf.name in tensors else []:
                there = idle[units.of[compact(label)]].expand(label.shape)
                there = there & (masked.get(leaf.name, torch.zeros(())) != ZERO)
                tensors[leaf.name][there] = torch.randn(int(there.sum()), dtype=torch.double)
        torch.testing.assert_close(noisy(x), model(x), rtol=1e-9, atol=1e-12)


def assert_shrinks(model, size, *others):
    small = copy.deepcopy(model)
    if ps.plan_shrink(small, images(2, size)).rows:
        ps.shrink(small, images(2, size))
    with torch.no_grad():
        for x in (images(2, size), *(images(1, other) for other in others)):
            torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_known_entries_do_not_depend_on_the_input(name):
    for seed in range(2):
        assert_known_values_stay(network([name, "sigmoid", "padded", "relu", name], seed), 4, 20)


@pytest.mark.parametrize("name", LAYERS)
def test_what_nobody_needs_has_no_effect(name):
    for seed in range(2):
        assert_unneeded_is_unneeded(network([name, "pointwise", "relu", name], seed), 4)


@settings(max_examples=settings.default.max_examples // 4)
@given(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=7), st.integers(0, 99))
def test_states_and_needs_of_random_networks(names, seed):
    model = network(names, seed)
    assert_known_values_stay(model, 3, 2)
    assert_unneeded_is_unneeded(model, 3)


@settings(max_examples=settings.default.max_examples // 4)
@given(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=7), st.integers(0, 99))
def test_random_networks_shrink_for_all_sizes(names, seed):
    assert_shrinks(network(names, seed), 2, 3, 7)
