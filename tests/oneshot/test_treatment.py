"""`OneShot` on models: counts, patterns, layers and dtypes, what it refuses, what it reports."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import parasparse as ps
from parasparse.patterns import block, chain, channel, n_of_m

UPDATES = ["none", "obs", "least_squares", "admm"]


class Conv1D(nn.Module):
    """The linear layer of GPT-2, written again: (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)


def statistics_of(model, *batches):
    with torch.no_grad(), ps.scores.collect(model, grams=True) as statistics:
        for x in batches:
            model(x)
    return statistics


def correlated(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[-1], shape[-1], generator=generator)
    return torch.randn(shape, generator=generator) @ mixing


LAYERS = {
    "linear": (lambda: nn.Linear(16, 12), (40, 16)),
    "conv1d of gpt2": (lambda: Conv1D(12, 16), (40, 16)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1), (6, 4, 7, 8)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, stride=2), (6, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 4, groups=8, dilation=2), (6, 8, 20)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding_mode="circular", padding=1), (3, 2, 4, 5, 4)),
    "float64": (lambda: nn.Linear(16, 12).double(), (40, 16)),
    "bfloat16": (lambda: nn.Linear(16, 12).bfloat16(), (40, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("update", UPDATES)
def test_every_layer_keeps_exact_counts_and_reports_its_real_error(name, update):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build()
    dtype = layer.weight.dtype
    x = correlated(*shape).to(dtype)
    history = []
    statistics = statistics_of(layer, x[:2], x[2:])
    before = layer.weight.detach().clone()
    for scope in ("row", "tensor", "global"):
        pruned = copy.deepcopy(layer)
        prune = ps.OneShot(0.5, statistics, scope=scope, update=update, history=history)
        ps.sparsify(pruned, prune)
        assert pruned.weight.dtype == dtype
        mask = ps.mask_of(pruned, "weight")
        assert torch.equal(ps.stored(pruned, "weight") != 0, mask)
        assert mask.sum() == mask.numel() // 2
        if update == "none":
            assert torch.equal(pruned.weight, before * mask)
        # The error of the outputs, from the outputs. Biases go, and padding is an input.
        with torch.no_grad():
            new, old = (m.double()(x.double()) - m.bias.view(-1, *[1] * (x.ndim - 2)) if x.ndim > 2
                        else m.double()(x.double()) - m.bias
                        for m in (pruned, copy.deepcopy(layer)))  # fmt: skip
        error = (new - old).square().sum() / old.square().sum()
        assert history[-1].error == pytest.approx(float(error), rel=1e-2)
        assert history[-1].lower_bound <= history[-1].damped_error * (1 + 1e-3) + 1e-6
        assert history[-1].kept == mask.sum()
    assert torch.equal(layer.weight, before)


PATTERNS = {
    "2:4": n_of_m(2, 4),
    "2:4 of outputs": n_of_m(2, 4, 0),
    "blocks": block((2, 4)),
    "channels": channel(0),
    "inputs": channel(1),
    "chain": chain(channel(0), n_of_m(2, 4)),
    "1:3 of a remainder": n_of_m(1, 3, remainder="pad"),
    "custom": lambda scores, sparsity: scores > scores.median(),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_pattern_holds_with_every_update(name, update, transposed):
    torch.manual_seed(0)
    pattern = PATTERNS[name]
    layer = Conv1D(16, 8) if transposed else nn.Linear(16, 8, bias=False)
    takes = ps.patterns.takes_sparsity(pattern)
    statistics = statistics_of(layer, correlated(60, layer.weight.shape[0 if transposed else 1]))
    prune = ps.OneShot(
        0.5 if takes else None, statistics, score="wanda", pattern=pattern, update=update
    )
    mask = ps.mask_of(ps.sparsify(layer, prune), "weight")
    if name != "custom":
        assert torch.equal(pattern(mask.float(), *([0.5] if takes else [])), mask)
    assert mask.any()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("pattern", [None, n_of_m(1, 4)])
def test_a_present_mask_stays(update, pattern):
    model = ps.sparsify(nn.Linear(16, 8), 0.5)
    before = ps.mask_of(model, "weight").clone()
    dense = model.weight.detach().clone()
    statistics = statistics_of(model, correlated(60, 16))
    history = []
    for sparsity in (0.7, 0.2) if pattern is None else (None,):
        again = copy.deepcopy(model)
        prune = ps.OneShot(
            sparsity, statistics, scope="tensor" if sparsity else "row", update=update,
            history=history, **({} if pattern is None else {"pattern": pattern}),
        )  # fmt: skip
        ps.sparsify(again, prune)
        mask = ps.mask_of(again, "weight")
        assert not (mask & ~before).any()
        if sparsity == 0.2:  # nothing more goes, so nothing changes
            assert torch.equal(mask, before)
            torch.testing.assert_close(again.weight, dense, rtol=1e-4, atol=1e-4)
        elif sparsity:
            assert mask.sum() == 128 - round(128 * 0.7)


@pytest.mark.parametrize("update", UPDATES)
def test_dead_inputs_go_first_and_cost_nothing(update):
    x = correlated(60, 16)
    x[:, [3, 7]] = 0
    layer = nn.Linear(16, 8)
    history = []
    statistics = statistics_of(layer, x)
    prune = ps.OneShot(2 / 16, statistics, update=update, history=history)
    before = layer.weight.detach().clone()
    mask = ps.mask_of(ps.sparsify(layer, prune), "weight")
    assert not mask[:, [3, 7]].any()
    assert history[0].dead_inputs == 2
    assert history[0].error == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(layer.weight, before * mask, rtol=1e-4, atol=1e-4)


def test_fewer_samples_than_inputs_are_reported():
    layer, history = nn.Linear(16, 8), []
    ps.sparsify(layer, ps.OneShot(0.5, statistics_of(layer, correlated(5, 16)), history=history))
    assert (history[0].samples, history[0].inputs) == (5, 16)
    layer = nn.Linear(16, 8)
    x = correlated(5, 16)
    prune = ps.OneShot(0.5, statistics_of(layer, x), damping=0.0)
    with pytest.raises(RuntimeError, match="positive definite") as caught:
        ps.sparsify(layer, prune)
    assert "weight" in caught.value.__notes__[0]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "ria"])
def test_without_inputs_magnitude_decides_and_says_so(update, score):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model, history = Unused(), []
    before = model.unused.weight.detach().clone()
    statistics = statistics_of(model, correlated(60, 16))
    with pytest.warns(UserWarning, match=r'"unused.weight" had no input'):
        ps.sparsify(model, ps.OneShot(0.5, statistics, score=score, update=update, history=history))
    assert history[1].samples == 0
    mask = ps.mask_of(model, "unused.weight")
    assert (mask.sum(1) == 8).all()
    torch.testing.assert_close(model.unused.weight, before * mask)
    if score != "ria":
        least = (before.abs() * mask).masked_fill(~mask, 9).amin(1)
        assert (least >= (before.abs() * ~mask).amax(1)).all()


def test_layers_that_have_a_parameter_in_common_are_written_once():
    first, second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    statistics = statistics_of(model, correlated(60, 16))
    assert statistics.count("0.weight") == 120
    ps.sparsify(model, ps.OneShot(0.5, statistics))
    assert torch.equal(first.weight, second.weight)
    assert first.weight.count_nonzero() == 128


def test_training_saving_and_folding_go_on():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = correlated(60, 16)
    ps.sparsify(model, ps.OneShot(0.5, statistics_of(model, x)))
    parameter = ps.stored(model, "0.weight")
    assert parameter is optimizer.param_groups[0]["params"][0]
    model(x).square().mean().backward()
    optimizer.step()
    assert (model[0].weight != 0).sum() <= 64
    pickle.loads(pickle.dumps(model))
    out = model(x)
    torch.testing.assert_close(ps.squash(model)(x), out)


def refusals():
    dense = nn.Linear(16, 8)
    statistics = statistics_of(dense, correlated(60, 16))
    normed = weight_norm(nn.Linear(16, 8))
    broken = nn.Linear(16, 8)
    broken.weight.data[0, 0] = float("nan")
    yield "no statistics", dense, ps.OneShot(0.5), "prune_blocks"
    gradients = ps.scores.Statistics(None, {}, {"weight": []})
    yield "without grams", dense, ps.OneShot(0.5, gradients), "grams=True"
    yield "other names", nn.Sequential(nn.Linear(16, 8)), ps.OneShot(0.5, statistics), "0.weight"
    yield (
        "weight_norm",
        normed,
        ps.OneShot(0.5, statistics_of(normed, correlated(60, 16))),
        "squash",
    )
    yield "nan", broken, ps.OneShot(0.5, statistics), "finite"
    yield (
        "a bad score",
        dense,
        ps.OneShot(0.5, statistics, update="none", score=lambda tensor, name: tensor[0]),
        "shape",
    )
    yield (
        "nan scores",
        dense,
        ps.OneShot(
            0.5, statistics, update="none", score=lambda tensor, name: tensor * float("nan")
        ),
        "NaN",
    )
    yield (
        "a bad pattern",
        dense,
        ps.OneShot(0.5, statistics, pattern=lambda scores, sparsity: scores),
        "bool",
    )
    yield "a width", dense, ps.OneShot(statistics=statistics, pattern=n_of_m(2, 5)), "divide"


REFUSALS = {case: rest for case, *rest in refusals()}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("update", UPDATES)
def test_a_refused_call_leaves_the_model_as_it_was(case, update):
    model, prune, message = REFUSALS[case]
    if "score" in case and update == "admm":
        pytest.skip("does not score")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        ps.sparsify(model, dataclasses.replace(prune, update=update))
    assert message in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert not ps.is_sparse(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


def test_a_later_rule_that_fails_leaves_all_weights_as_they_were():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    before = copy.deepcopy(model.state_dict())
    prune = ps.OneShot(0.5, statistics_of(model, correlated(60, 16)))
    with pytest.raises(ValueError, match="NaN"):
        ps.sparsify(model, {"0": prune, "1": ps.Prune(0.5, score=lambda t, n: t * float("nan"))})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_writes_nothing():
    model = nn.Linear(16, 8)
    before = model.weight.detach().clone()
    ps.plan(model, ps.OneShot(0.5, statistics_of(model, correlated(60, 16))))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 1.5}, {"sparsity": None}, {"pattern": n_of_m(2, 4)}, {"scope": "local"},
        {"update": "sgd"}, {"score": "taylor"}, {"damping": -1.0}, {"damping": float("nan")},
        {"block": 0}, {"swaps": -1}, {"swaps": 1, "update": "none"},
        {"swaps": 1, "pattern": channel(0)},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        ps.OneShot(**{"sparsity": 0.5, **arguments})


def test_complex_weights_are_refused_by_name():
    model = nn.Linear(4, 4, dtype=torch.complex64)
    statistics = ps.scores.Statistics(None, {}, {})
    with pytest.raises(ValueError, match='"weight" is complex'):
        ps.sparsify(model, ps.OneShot(0.5, statistics))


@pytest.mark.parametrize("update", UPDATES)
def test_autocast_changes_nothing(update):
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), correlated(100, 32)
    prune = ps.OneShot(0.5, statistics_of(layer, x), update=update)
    other = ps.sparsify(copy.deepcopy(layer), prune)
    with torch.autocast("cpu", torch.bfloat16):
        ps.sparsify(layer, prune)
    assert torch.equal(layer.weight, other.weight)


def test_statistics_can_be_given_later():
    layer = nn.Linear(16, 8)
    statistics = statistics_of(layer, correlated(60, 16))
    prune = ps.OneShot(0.5, update="obs", swaps=0)
    bound = dataclasses.replace(prune, statistics=statistics, history=[])
    ps.sparsify(layer, bound)
    assert [row.name for row in bound.history] == ["weight"]
    assert "sparsity=0.5" in repr(prune)


def test_swaps_lower_the_error_of_models():
    errors = []
    for swaps in (0, 5):
        torch.manual_seed(0)
        layer, history = nn.Linear(32, 16), []
        statistics = statistics_of(layer, correlated(200, 32))
        prune = ps.OneShot(
            0.7, statistics, update="least_squares", score="wanda", swaps=swaps, history=history
        )
        assert ps.sparsify(layer, prune).weight.count_nonzero() == 16 * (32 - round(32 * 0.7))
        errors.append(history[0].damped_error)
    assert errors[1] < errors[0]
