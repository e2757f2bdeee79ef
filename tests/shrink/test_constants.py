"""Dead filters still feed constants: they are folded or collapsed, and the outputs stay."""

import copy
from fnmatch import fnmatch

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision import models

import parasparse as ps
from parasparse.shrink.facts import KNOWN
from parasparse.shrink.rules.products import constants_of

FILTERS = ps.patterns.channel(0)


class Branches(nn.Module):
    """Two padded convolutions without biases read one layer, after norms of their own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        self.readers = nn.ModuleList(nn.Conv2d(12, 4, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([r(n(x).relu()) for r, n in zip(self.readers, self.norms, strict=True)], 1)


class SqueezeExcite(nn.Module):
    """A constant that a padded depthwise convolution reads is none behind it."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, stride=2, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.project = nn.Conv2d(12, 4, 1, bias=False)

    def forward(self, x):
        x = self.depthwise(self.expand(x).sigmoid())
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.project(x * gate)


class OneChannel(nn.Module):
    """Of the last layer, which pads, one channel is picked by its number."""

    def __init__(self, pick):
        super().__init__()
        self.one, self.two, self.pick = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1), pick

    def forward(self, x):
        return self.pick(self.two(self.one(x).sigmoid()))


PICKS = {
    "index": lambda x: x[:, 1],
    "last": lambda x: x[:, -1],
    "select": lambda x: x.select(1, 2),
    "slice": lambda x: x[:, 1:2],
    "unbind": lambda x: x.unbind(1)[3],
    "split": lambda x: x.split(1, 1)[0],
    "chunk": lambda x: x.chunk(4, 1)[0].squeeze(1),
    "movedim": lambda x: x.movedim(1, 0)[2],
    "product": lambda x: (x.flatten(2) @ x.flatten(2).mT)[:, 0, 1],
}


class Twice(nn.Module):
    """A reader whose weight is used twice, for different constants."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.reader = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        return self.reader(self.one(x).sigmoid()) * self.reader(self.two(x).sigmoid())


class GroupsAfter(nn.Module):
    """Dead channels that stay because the groups must keep equally many."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.two(self.one(x).sigmoid()).sigmoid()
        return self.head(self.grouped(x).relu())


class SumOverPlaces(nn.Module):
    """A sum over the places of an image is no constant, even if all that it sums is one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.one(x).sigmoid().sum((2, 3)))


class AveragedBorders(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.pool = nn.AvgPool2d(3, 2, padding=1)

    def forward(self, x):
        return self.two(self.pool(self.one(x).sigmoid()))


def norms():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Sigmoid(),
        nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Tanh(),
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def padded_before():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.ZeroPad2d(1), nn.Conv2d(8, 6, 3), nn.Sigmoid(),
        nn.Conv2d(6, 3, 1),
    )  # fmt: skip


def linear():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 3),
    )  # fmt: skip


CASES = {
    "norms": norms, "branches": Branches, "squeeze-excite": SqueezeExcite, "twice": Twice,
    "groups": GroupsAfter, "sum": SumOverPlaces, "borders": AveragedBorders, "linear": linear,
    "padded before": padded_before,
}  # fmt: skip


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator).add_(0.2))
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.data -= 0.6  # of both signs
    return model


def layers(model):
    kinds = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def random_filters(sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    score = lambda tensor, name: torch.rand(tensor.shape, generator=generator)  # noqa: E731
    return ps.Prune(sparsity, pattern=FILTERS, score=score)


def images(size):
    return torch.randn(2, 3, size, size, dtype=torch.double)


def shrunk(model, example):
    small = copy.deepcopy(model)
    plan = ps.plan_shrink(small, example)
    return (ps.shrink(small, example) if plan.rows else small), plan


def assert_equal(small, masked, *sizes):
    with torch.no_grad():
        for size in sizes:
            x = images(size)
            torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 9], ids=["small", "large"])
@pytest.mark.parametrize("name", CASES)
def test_the_outputs_stay_for_all_image_sizes(name, size):
    size = max(size, 4 if name in ("branches", "twice", "linear") else 1)
    for seed in range(2):
        model = randomized(CASES[name](), seed)
        names = layers(model)[:-1]
        ps.sparsify(model, {layer: random_filters(0.5, seed) for layer in names})
        assert_equal(shrunk(model, images(size))[0], model, size, size + 5, size + 16)


@pytest.mark.parametrize("name", PICKS)
def test_what_a_picked_channel_reads_stays(name):
    torch.manual_seed(0)
    model = OneChannel(PICKS[name]).double()
    ps.sparsify(model, {"one": random_filters(0.5, 0)})
    small, _ = shrunk(model, images(5))
    assert small.one.out_channels == 5  # one of the constants stands for the others
    assert_equal(small, model, 5, 9)


def test_unstructured_masks_on_readers_and_biases_keep_what_cannot_be_written():
    for seed in range(4):
        model = randomized(norms(), seed)
        rules = {f"{n}.weight": random_filters(0.5, seed) for n in ("0", "3", "6")}
        score = lambda tensor, name: torch.rand(tensor.shape)  # noqa: E731
        rules |= {n: ps.Prune(0.3, score=score) for n in ("9.*", "0.bias", "10.bias")}
        ps.sparsify(model, rules)
        parametrized = [m for m in model.modules() if parametrize.is_parametrized(m)]
        assert parametrized
        assert_equal(shrunk(model, images(5))[0], model, 5, 8)


# Networks with batch norm, and the layers whose filters are dropped: in networks with residual sums
# those within the blocks, because a sum with a living channel lives.
WITH_NORMS = {
    "vgg11_bn": ({}, ["*"]),
    "googlenet": ({"init_weights": False, "aux_logits": False}, ["*"]),
    "densenet121": ({}, ["*"]),
    "resnet18": ({}, ["layer*.conv1"]),
    "resnet50": ({}, ["layer*.conv1", "layer*.conv2"]),
}


@pytest.mark.parametrize("name", WITH_NORMS)
def test_nearly_all_dead_filters_of_a_network_with_batch_norm_go(name):
    arguments, globs = WITH_NORMS[name]
    model = randomized(getattr(models, name)(weights=None, **arguments))
    reached = [n for n in layers(model)[:-1] if any(fnmatch(n, glob) for glob in globs)]
    masked = ps.sparsify(model, {n: random_filters(0.5, i) for i, n in enumerate(reached)})
    rows = {row.name: dict(row.kept) for row in ps.plan_shrink(masked, images(64)).rows}
    dead = gone = 0
    for weight, mask in ps.named_masks(masked):
        dropped = {i for i, entries in enumerate(mask) if not entries.any()}
        dead += len(dropped)
        gone += len(dropped.difference(rows[weight].get(0, dropped)))
    assert gone >= 0.97 * dead > 0


def test_one_constant_stands_for_those_that_a_padded_convolution_reads():
    padded = nn.Conv2d(8, 4, 3, padding=1)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), padded))
    ps.sparsify(model, {"0.weight": random_filters(0.5, 0)})
    small, plan = shrunk(model, images(6))
    assert small[0].out_channels == 5
    (row,) = plan.kept_back
    assert "stands for the others" in row.reason
    assert_equal(small, model, 6, 3)
    assert not ps.plan_shrink(small, images(6)).rows


def test_places_of_a_sequence_are_no_constants():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(5, 8), nn.Embedding(9, 8)
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, index):
            places = self.places(torch.arange(index.shape[1])).expand(*index.shape, 8)
            return self.head(self.mix(places).sigmoid() + self.words(index))

    model = randomized(Positions())
    columns = ps.Prune(0.5, pattern=ps.patterns.channel(1))
    ps.sparsify(model, {"words": columns, "mix": random_filters(0.5, 0)})
    small, _ = shrunk(model, torch.zeros(1, 1, dtype=torch.long))
    index = torch.tensor([[0, 3, 1, 4]])
    torch.testing.assert_close(small(index), model(index), rtol=1e-9, atol=1e-12)


def test_units_of_a_model_on_the_meta_device_are_those_of_a_real_one():
    real, example = randomized(models.squeezenet1_1(weights=None)), images(64)
    meta = copy.deepcopy(real).to("meta")
    units, others = ps.coupled(real, example), ps.coupled(meta, example.to("meta"))
    scores = {n: p.detach().abs() for n, p in real.named_parameters() if units.reaches(n, real, p)}
    masks, same = units.jointly(scores, 0.5), others.jointly(scores, 0.5)
    assert all(torch.equal(mask, same[name]) for name, mask in masks.items())
    with pytest.raises(RuntimeError, match="has no values"):
        ps.plan_shrink(meta, example.to("meta"))


def test_constants_that_a_kernel_rounds_in_two_ways_are_constants():
    ones = torch.tensor([[0.1, 0.2, 0.0], [0.1, 0.2, 0.0]])
    ones[1, 0] += torch.finfo(torch.float32).eps / 8
    assert ones[0, 0] != ones[1, 0]
    ones[1, 1] = 0.2001
    known = torch.full((3,), KNOWN, dtype=torch.uint8)
    values = constants_of(ones, known)
    assert values[0] == ones[0, 0].double()
    assert values[1].isnan()
    assert values[2] == 0
