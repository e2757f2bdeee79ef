"""Smaller networks compute what the masked ones did, for other inputs as well."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import parasparse as ps


def filters(sparsity):
    return ps.Prune(sparsity, pattern=ps.patterns.channel(0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 12, 1)
        self.two = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.two(self.one(x).relu())
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Halves of one projection are multiplied."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(8, 6)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Attention(nn.Module):
    """Heads in one fused projection; the number of heads is an attribute."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 3
        self.qkv = nn.Linear(8, 36)
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(y.transpose(1, 2).reshape(batch, length, self.heads * self.width))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.head(self.depthwise(self.grouped(self.one(x).relu()).relu()).relu())


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 5)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        return self.head(torch.cat([self.one(x), self.two(x).relu()], dim=-1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        x = self.embedding(index)
        return self.head(x + self.down(self.up(x).tanh()))


class Recurrent(nn.Module):
    def __init__(self, kind, hidden=6):
        super().__init__()
        self.rnn = kind(5, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def images(batch, size=8):
    return torch.randn(batch, 3, size, size)


def tokens(batch, length=4):
    return torch.randint(11, (batch, length))


def steps(batch, length):
    return torch.randn(batch, length, 5)


CASES = {  # a model, an example, other inputs
    "flatten": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3),
            nn.Flatten(),
            nn.Linear(24, 10),
            nn.GELU(),
            nn.Linear(10, 3),
        ),
        lambda: images(2),
        lambda: images(5),
    ),
    "residual": (Residual, lambda: images(2), lambda: images(3, 11)),
    "gated": (Gated, lambda: torch.randn(2, 6), lambda: torch.randn(4, 3, 6)),
    "attention": (Attention, lambda: torch.randn(2, 5, 8), lambda: torch.randn(1, 9, 8)),
    "grouped": (Grouped, lambda: images(2), lambda: images(3, 9)),
    "joined": (Joined, lambda: torch.randn(2, 6), lambda: torch.randn(7, 6)),
    "tied": (Tied, lambda: tokens(2), lambda: tokens(3, 7)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: steps(2, 4), lambda: steps(3, 7)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: steps(2, 4), lambda: steps(3, 7)),
    "odd": (lambda: Recurrent(nn.LSTM, 7), lambda: steps(2, 4), lambda: steps(3, 7)),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: steps(2, 4), lambda: steps(3, 7)),
    "resnet18": (
        lambda: models.resnet18(weights=None),
        lambda: images(1, 32),
        lambda: images(2, 48),
    ),
    "mobilenet": (
        lambda: models.mobilenet_v3_small(weights=None),
        lambda: images(1, 32),
        lambda: images(2, 48),
    ),
}


def built(name, seed=0):
    """A model in float64 with statistics and biases that are not 0, and its inputs."""
    torch.manual_seed(seed)
    build, example, others = CASES[name]
    model = build().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-1, 1)
    inputs = [t.double() if t.is_floating_point() else t for t in (example(), others())]
    return model.double(), inputs[0], inputs[1]


def pruned(model, example, sparsity=0.5):
    """Whole units are pruned, by random scores."""
    units = ps.coupled(model, example)
    score = lambda tensor, name: torch.rand(tensor.shape)  # noqa: E731
    return ps.sparsify(model, units.rules(sparsity, score=score))


def assert_same(small, masked, *inputs):
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_units_that_are_pruned_go_and_nothing_else_changes(name):
    model, example, others = built(name)
    pruned(model, example)
    masked = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    names = list(ps.dense_state_dict(model))
    assert ps.shrink(model, example) is model
    assert sum(p.numel() for p in model.parameters()) < 0.95 * before
    assert list(model.state_dict()) == names  # all masks had only whole units to drop
    assert_same(model, masked, example, others)


@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in ("tied", "lstm", "gru", "odd", "rnn")]
)
def test_filters_alone_are_enough_where_what_they_feed_can_be_folded(name):
    model, example, others = built(name)
    kinds = (nn.Conv2d, nn.Linear)
    layers = [n for n, m in model.named_modules() if isinstance(m, kinds)][:-1]
    ps.sparsify(model, {layer: filters(0.5) for layer in layers})
    masked = copy.deepcopy(model)
    plan = ps.plan_shrink(model, example)
    assert all(row.reason for row in plan.kept_back)
    if plan.rows:
        ps.shrink(model, example)
    assert_same(model, masked, example, others)


def test_zeros_of_a_model_without_masks_count():
    model, example, others = built("flatten")
    with torch.no_grad():
        model[6].weight[:4], model[6].bias[:4] = 0, 0
    reference = copy.deepcopy(model)
    ps.shrink(model, example)
    assert model[6].out_features == 6
    assert model[8].in_features == 6
    assert_same(model, reference, example, others)


def test_zeros_beside_masks_do_not_count():
    model, example, _ = built("flatten")
    with torch.no_grad():
        model[8].weight[:, :5] = 0  # not trained yet, perhaps
    ps.sparsify(model, {"4": filters(0.5)})
    ps.shrink(model, example)
    assert model[8].in_features == 10
    assert model[4].out_channels == 3


def test_a_plan_says_what_goes_and_changes_nothing():
    model, example, _ = built("flatten")
    ps.sparsify(model, {"4": filters(0.5)})
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = ps.plan_shrink(model, example)
    rows = {row.name: row.new_shape for row in plan.rows}
    assert rows == {"4.weight": (3, 8, 3, 3), "4.bias": (3,), "6.weight": (10, 12)}
    assert {str(row) for row in plan.attributes} == {
        "4.out_channels: 6 -> 3", "6.in_features: 24 -> 12",
    }  # fmt: skip
    assert plan.bytes[1] < plan.bytes[0]
    assert plan.multiply_adds[1] < plan.multiply_adds[0]
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_plan_as_json_cuts_a_fresh_model_into_which_the_checkpoint_loads():
    model, example, others = built("attention")
    pruned(model, example)
    plan = ps.Shrinkage.from_json(ps.plan_shrink(model, example).to_json())
    ps.shrink(model, example)
    fresh = ps.shrink(built("attention", seed=1)[0], plan)
    fresh.load_state_dict(model.state_dict())
    assert fresh.heads == model.heads == 2
    assert_same(fresh, model, example, others)


def test_dead_channels_that_stay_have_a_reason():
    model, example, _ = built("residual")
    ps.sparsify(model, {"two": filters(0.5)})  # the stem feeds the same sum
    with pytest.raises(ValueError, match=r"two.weight, dimension 0: 4 dead channels stay"):
        ps.shrink(model, example)


def test_nothing_more_can_be_removed_afterwards():
    model, example, _ = built("grouped")
    pruned(model, example)
    ps.shrink(model, example)
    assert not ps.plan_shrink(model, example).rows


def test_masks_that_drop_more_stay_and_are_cut():
    model, example, others = built("flatten")
    ps.sparsify(model, {"6": 0.5, "4": filters(0.5)})
    masked = copy.deepcopy(model)
    ps.shrink(model, example)
    assert {n: tuple(mask.shape) for n, mask in ps.named_masks(model)} == {"6.weight": (10, 12)}
    assert_same(model, masked, example, others)


def test_optimizer_state_is_cut_along():
    model, example, _ = built("flatten")
    ps.sparsify(model, {"4": filters(0.5)})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(example).square().sum().backward()
    optimizer.step()
    ps.shrink(model, example, optimizer=optimizer)
    optimizer.zero_grad()
    model(example).square().sum().backward()
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_a_model_that_writes_into_its_input_leaves_the_example_as_it_was():
    class Writes(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model = nn.Sequential(Writes(4, 8), nn.ReLU(), nn.Linear(8, 2))
    example = torch.randn(3, 4)
    before = example.clone()
    ps.shrink(pruned(model, example), example)
    assert torch.equal(example, before)


class Heads(nn.Module):
    """Attention whose program computes the size of a head from that of a layer."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        width = self.q.out_features // self.heads
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, width).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(found.reshape(*x.shape[:2], self.out.in_features))


def test_sizes_computed_from_those_of_a_layer_follow():
    model, x = Heads().double().eval(), torch.randn(2, 5, 16).double()
    units = ps.coupled(model, x)
    masked = ps.sparsify(model, units.rules(0.5))
    small = ps.shrink(copy.deepcopy(masked), x, check=False)
    assert (small.heads, small.q.out_features) == (2, 8)
    torch.testing.assert_close(small(x), masked(x))
