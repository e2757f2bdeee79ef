"""Gram matrices of inputs: which inputs, counted how often, stored once."""

import copy
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import parasparse as ps


def seen(model, *batches, targets=None):
    with torch.no_grad(), ps.scores.collect(model, targets, grams=True) as statistics:
        for x in batches:
            model(x)
    return statistics


def storage(statistics, name):
    return statistics.gram(name).data_ptr()


def product(x):
    x = x.double().flatten(0, -2)
    return x.T @ x


class Attention(nn.Module):
    """Three layers of one input, one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4) for _ in range(3))
        self.out = nn.Linear(4, 6)

    def forward(self, x):
        return self.out(self.q(x) * self.k(x) + self.v(x))


def test_layers_with_the_same_inputs_share_one():
    model, batches = Attention(), [torch.randn(2, 5, 6) for _ in range(3)]
    statistics = seen(model, *batches)
    torch.testing.assert_close(statistics.gram("q.weight"), product(torch.cat(batches)))
    assert len({storage(statistics, f"{name}.weight") for name in "qkv"}) == 1
    assert storage(statistics, "out.weight") != storage(statistics, "q.weight")
    assert {statistics.count(f"{name}.weight") for name in ("q", "k", "v", "out")} == {30}
    assert statistics.gram("q.weight").dtype == torch.float64


class Part(nn.Module):
    """Calls its layers as a plan says: pairs of layer and input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 3) for _ in range(3))

    def forward(self, calls):
        for name, x in calls:
            getattr(self, name)(x)


X, Y, Z = (torch.randn(5, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
PLANS = {
    "together": "aX bX cX | aY bY cY",
    "one leaves": "aX bX cX | aY bY cZ",
    "one misses the last": "aX bX cX | aY cY",
    "one misses the second": "aX bX | aY | aZ bZ",
    "the first misses it": "aX bX | bY | aZ bZ",
    "another order": "aX bX | bY aY | aZ bZ",
    "one by one": "aX aY | bX bY",
    "twice": "aX aX bX | aY bY",
    "two of three": "aX bX cX | aY bY | aZ bZ cZ",
    "one comes later": "aX bX | aY bY cY",
    "one goes on alone": "aX bX | aY bY | aZ",
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_each_layer_counts_what_it_was_called_with(plan, mode):
    model, inputs = Part(), {"X": X, "Y": Y, "Z": Z}
    with mode(), ps.scores.collect(model, grams=True) as statistics:
        fresh = {key: value.clone() for key, value in inputs.items()}
        for forward in plan.split("|"):
            model([(call[0], fresh[call[1]]) for call in forward.split()])
    for name in "abc":
        own = [inputs[call[1]] for call in plan.replace("|", "").split() if call[0] == name]
        assert statistics.count(f"{name}.weight") == 5 * len(own)
        if own:
            found = statistics.gram(f"{name}.weight")
            torch.testing.assert_close(found, product(torch.cat(own)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_changes_in_place_is_another(mode):
    model = Part()
    with mode(), ps.scores.collect(model, grams=True) as statistics:
        x = X.clone()
        model([("a", x), ("b", x)])
        model([("a", y := Y.clone())])
        y.add_(1)
        model([("b", y)])
    torch.testing.assert_close(statistics.gram("a.weight"), product(torch.cat([X, Y])))
    torch.testing.assert_close(statistics.gram("b.weight"), product(torch.cat([X, Y + 1])))


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, (3, 2), padding=(2, 1), stride=(2, 1), dilation=(1, 2)),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "reflected": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "1d": nn.Conv1d(4, 6, 3, stride=2),
    "3d": nn.Conv3d(4, 6, 2, padding=1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_have_the_gram_of_their_patches(name):
    """The squared outputs of any weight are what its Gram matrix says."""
    layer = copy.deepcopy(CONVOLUTIONS[name]).double()
    layer.bias = None
    x = torch.randn(3, 4, *[7, 6, 5][: layer.weight.ndim - 2], dtype=torch.double)
    statistics = seen(layer, x[:1], x[1], x[2:])
    gram = statistics.gram("weight")
    size = layer.weight[0].numel()
    assert gram.shape == ((size, size) if layer.groups == 1 else (layer.groups, size, size))
    out = layer(x)
    assert statistics.count("weight") == out[:, 0].numel()
    rows = layer.weight.view(layer.groups, -1, size)
    energy = (rows @ gram * rows).sum(-1).flatten()
    torch.testing.assert_close(energy, out.square().transpose(0, 1).flatten(1).sum(1))


def test_a_tied_weight_is_read_as_each_of_its_layers_does():
    one, two = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=2, dilation=2)
    x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    expected = 0
    for layer in (one, two):
        with torch.no_grad(), ps.scores.collect(layer, grams=True) as statistics:
            layer(x)
        expected = expected + statistics.gram("weight")
    two.weight = one.weight
    model = nn.ModuleList([one, two])
    with torch.no_grad(), ps.scores.collect(model, grams=True) as statistics:
        for layer in model:
            layer(x)
    torch.testing.assert_close(statistics.gram("0.weight"), expected)


def test_an_unfolded_convolution():
    x = torch.randn(2, 4, 6, 7)
    patches = F.unfold(x.double(), 3).mT
    torch.testing.assert_close(seen(nn.Conv2d(4, 5, 3), x).gram("weight"), product(patches))


def test_input_norms_are_those_without_grams():
    layers = [nn.Linear(6, 4), nn.Embedding(5, 3), *CONVOLUTIONS.values()]
    for layer in layers:
        x = torch.randn(3, 4, *[7, 6, 5][: layer.weight.ndim - 2])
        x = torch.tensor([0, 1, 1]) if isinstance(layer, nn.Embedding) else x
        x = torch.randn(3, 6) if isinstance(layer, nn.Linear) else x
        with torch.no_grad(), ps.scores.collect(layer, "weight") as plain:
            layer(x)
        expected = plain.input_norm("weight")
        found = seen(layer, x, targets="weight").input_norm("weight")
        assert found.shape == expected.shape
        torch.testing.assert_close(found.float(), expected)


WIDE = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0)).exp() - 1
WHOLE = seen(nn.Linear(300, 2), WIDE).gram("weight")


WIDER = torch.cat((WIDE, WIDE.roll(1, 0), WIDE), 1)  # products in 32 bits
WHOLES = {300: (WIDE, WHOLE), 900: (WIDER, seen(nn.Linear(900, 2), WIDER).gram("weight"))}


@pytest.mark.parametrize("inputs", WHOLES)
@given(cuts=st.lists(st.integers(0, 2000), max_size=6))
@settings(max_examples=8)
def test_any_batches_of_the_same_rows_give_the_same_bits(inputs, cuts):
    rows, whole = WHOLES[inputs]
    sizes = [b - a for a, b in itertools.pairwise([0, *sorted(cuts), 2000])]
    statistics = seen(nn.Linear(inputs, 2), *rows.split(sizes))
    assert torch.equal(statistics.gram("weight"), whole)
    assert statistics.count("weight") == 2000


def test_the_sum_of_many_rows_is_their_product_and_symmetric():
    torch.testing.assert_close(WHOLE, product(WIDE), rtol=1e-12, atol=1e-12)
    assert torch.equal(WHOLE, WHOLE.T)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_products_of_many_inputs_have_the_errors_of_a_block_in_32_bits(precision, request):
    flags = torch.backends.mkldnn.matmul
    request.addfinalizer(partial(setattr, flags, "fp32_precision", flags.fp32_precision))
    flags.fp32_precision = precision
    found = seen(nn.Linear(900, 2), WIDER).gram("weight")
    norms = WIDER.double().norm(dim=0)
    most = 512 * torch.finfo(torch.float32).eps / 2 * norms.outer(norms)
    assert ((found - product(WIDER)).abs() <= most).all()
    assert torch.equal(found, found.T)
    doubles = seen(nn.Linear(900, 2).double(), WIDER.double()).gram("weight")
    torch.testing.assert_close(doubles, product(WIDER), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 300, 1500])
def test_inputs_far_from_0_keep_how_they_differ(rows):
    centred = torch.randn(rows, 600, generator=torch.Generator().manual_seed(0)).double()
    centred += torch.linspace(0, 1, rows).unsqueeze(1)  # the mean moves
    x = (centred + 100).float()
    found, norms = seen(nn.Linear(600, 2), x).gram("weight"), centred.norm(dim=0)
    most = 512 * torch.finfo(torch.float32).eps / 2 * norms.outer(norms)
    assert ((found - product(x)).abs() <= most + 1e-13 * product(x)).all()
    parts = seen(nn.Linear(600, 2), *x.split(97))
    assert torch.equal(found, parts.gram("weight"))


def test_a_layer_that_leaves_others_keeps_its_own_sum():
    a, b = (50 + torch.randn(700, 600) for _ in range(2))
    model = nn.ModuleDict({"one": nn.Linear(600, 2), "two": nn.Linear(600, 2)})
    with torch.no_grad(), ps.scores.collect(model, grams=True) as statistics:
        for x, names in ((a, ("one", "two")), (b, ("one",)), (a, ("two",))):
            for name in names:
                model[name](x)
    torch.testing.assert_close(statistics.gram("one.weight"), product(torch.cat([a, b])))
    torch.testing.assert_close(statistics.gram("two.weight"), product(torch.cat([a, a])))


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_masks_and_weights_do_not_depend_on_batches(name):
    torch.manual_seed(0)
    x = torch.randn(120, 32) @ torch.randn(32, 32)
    model = nn.Linear(32, 8) if name == "linear" else nn.Conv1d(4, 8, 3, groups=2)
    x = x if name == "linear" else x.view(120, 4, 8)
    found = []
    for size in (1, 7, 60, 120):
        prune = ps.OneShot(0.5, seen(model, *x.split(size)))
        found.append(prune({"weight": model.weight})["weight"])
    for other in found[1:]:
        assert torch.equal(other.mask, found[0].mask)
        assert torch.equal(other.weights, found[0].weights)


def test_a_gram_read_in_the_block_goes_on():
    model = nn.Linear(6, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with ps.scores.collect(model, grams=True) as statistics:
            for count, part in enumerate((X, Y), 1):
                with mode():
                    model(F.pad(part, (0, 2)))
                assert statistics.gram("weight").diagonal()[:4].gt(0).all()
                assert statistics.count("weight") == 5 * count
        expected = product(F.pad(torch.cat([X, Y]), (0, 2)))
        torch.testing.assert_close(statistics.gram("weight"), expected)


def test_a_batch_that_is_not_finite_is_named_and_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with (
        pytest.raises(RuntimeError, match=r'input 3 of "0.weight"'),
        torch.no_grad(),
        ps.scores.collect(model, grams=True),
    ):
        for _ in range(2):
            model(torch.randn(3, 4))
        model(torch.tensor([[1.0, float("inf"), 0.0, 0.0]]))
    model(torch.full((1, 4), float("nan")))  # the hooks are gone


def test_what_has_no_gram_says_so():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.ConvTranspose1d(3, 2, 1))
    statistics = seen(nn.Sequential(*model[:2]), torch.tensor([1, 2]), targets="*")
    with pytest.raises(RuntimeError, match="no Gram matrix"):
        statistics.gram("0.weight")
    with pytest.raises(RuntimeError, match="no statistics were collected"):
        statistics.gram("2.weight")
    with torch.no_grad(), ps.scores.collect(model[1]) as statistics:
        model[1](torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="grams=True"):
        statistics.gram("weight")
    unseen = seen(model[1])
    assert unseen.count("weight") == 0
    with pytest.raises(RuntimeError, match="no input"):
        unseen.gram("weight")


def test_no_gradient_is_collected_with_grams():
    model = ps.sparsify(nn.Linear(6, 4), 0.5)
    with ps.scores.collect(model, grams=True) as statistics:
        model(torch.randn(3, 6)).sum().backward()
    assert statistics.gram("weight").shape == (6, 6)
    with pytest.raises(RuntimeError, match="no gradient"):
        statistics.gradient("weight")


def test_half_precision_and_autocast_sum_in_64_bits():
    x = torch.randn(50, 6).bfloat16()
    assert torch.equal(seen(nn.Linear(6, 4).bfloat16(), x).gram("weight"), product(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seen(nn.Linear(6, 4), x.float()).gram("weight"), product(x))


def test_ria_and_sparsegpt_score_as_their_papers_say():
    layer, x = nn.Linear(6, 4), torch.randn(50, 6)
    x[:, 2] = 0
    statistics = seen(layer, x)
    weight = layer.weight.detach()
    size = weight.abs()
    expected = (size / size.sum(1, keepdim=True) + size / size.sum(0)) * x.norm(dim=0).sqrt()
    found = ps.scores.ria(statistics)(weight, "weight")
    torch.testing.assert_close(found.float(), expected)
    matrix = x.T.double() @ x.double()
    matrix[2, 2] = 1
    matrix += 0.1 * (x.double().square().sum() / 6) * torch.eye(6)
    expected = weight.square() / torch.linalg.inv(matrix).diagonal()
    expected[:, 2] = 0
    found = ps.scores.sparsegpt(statistics, damping=0.1)(weight, "weight")
    torch.testing.assert_close(found, expected)
    for score in (ps.scores.ria(statistics), ps.scores.sparsegpt(statistics)):
        pruned = ps.sparsify(copy.deepcopy(layer), ps.Prune(0.5, score=score))
        assert pruned.weight.count_nonzero() == 12


def test_scores_of_grouped_convolutions_rank_each_group():
    layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 7, 6)
    statistics = seen(layer, x)
    for score in (ps.scores.ria(statistics), ps.scores.sparsegpt(statistics)):
        whole = score(layer.weight.detach(), "weight")
        for group, (weight, part) in enumerate(
            zip(layer.weight.detach().chunk(2), x.chunk(2, 1), strict=True)
        ):
            own = nn.Conv2d(2, 3, 3)
            alone = type(score)(seen(own, part))(weight, "weight")
            torch.testing.assert_close(whole[3 * group : 3 * group + 3], alone)
