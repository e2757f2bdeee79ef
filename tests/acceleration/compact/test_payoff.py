"""What `compact_payoff` measures, reports and leaves alone."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import parasparse as ps
from parasparse.acceleration import measure
from parasparse.targets.reach import masked_targets
from tests.acceleration.cases import CASES
from tests.acceleration.compact.test_uses import MORE
from tests.helpers.machine import needs_mkl

pytestmark = [
    needs_mkl,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
EVERY = {**CASES, **MORE}


@pytest.fixture
def steps(monkeypatch):
    """Let the clock say 1 ms for dense, 2 for masked, 0.5 for compact; return what it would time.

    Another tuple of milliseconds in `steps.ms` replaces these.
    """

    class Steps(list):
        ms = (1.0, 2.0, 0.5)

    found = Steps()

    def timed(calls):
        assert list(calls) == ["dense", "masked", "compact"]
        found.append(calls)
        return dict(zip(calls, found.ms, strict=True))

    monkeypatch.setattr(measure, "timed", timed)
    return found


def case(name):
    build, inputs = EVERY[name]
    torch.manual_seed(0)
    rules = {"embedding.weight": 0.8} if name == "tied" else 0.8
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    model = ps.sparsify(build(), rules)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(wide.get(parameter.dtype, parameter.dtype))
    return model, tree_map(lambda t: t.to(wide.get(t.dtype, t.dtype)), inputs)


def run(step):
    torch.manual_seed(0)  # dropout
    return step()


def without_times(table):
    names = ("name", "shape", "sparsity", "rows", "weights", "reason")
    return [{name: row[name] for name in names} for row in table.to_dicts()]


@pytest.mark.parametrize("name", EVERY)
def test_each_way_runs_the_layer_and_its_gradients(name, steps):
    model, inputs = case(name)
    before = ps.compact_payoff(model, inputs)
    assert {row.name for row in before} == {name for name, _ in ps.named_masks(model)}
    assert all(not row.reason and row.compact_ms >= 0.5 for row in before)
    for each in steps:
        masked, compact = (tree_leaves(run(each[way])) for way in ("masked", "compact"))
        assert len(masked) == len(compact)
        for one, other in zip(masked, compact, strict=True):
            got = one[one != 0] if one.shape != other.shape else one  # of a weight
            want = other[other != 0] if one.shape != other.shape else other
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    after = ps.compact_payoff(ps.compact(model), inputs)
    assert without_times(after) == without_times(before)


def everything(model):
    """Return all that a measurement could change."""
    parameters = [(id(p), p._version, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(id(b), b._version) for b in model.buffers()]
    modes = [(m.training, list(m.__dict__), list(m._buffers)) for m in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return parameters, buffers, modes, torch.get_rng_state().tolist(), values


def equal(one, other):
    return one[:-1] == other[:-1] and all(t.equal(other[-1][n]) for n, t in one[-1].items())


@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_random_numbers_do_not_change(is_compact, training):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.LSTM(8, 4)
    )
    ps.sparsify(model, 0.5).train(training)
    if is_compact:
        ps.compact(model)
    model(torch.randn(3, 6))[0].sum().backward()
    before = everything(model)
    with torch.no_grad():
        ps.compact_payoff(model, torch.randn(3, 6, generator=torch.Generator()))
    assert equal(everything(model), before)
    with pytest.raises(RuntimeError):
        ps.compact_payoff(model, torch.zeros(3, 7))
    assert equal(everything(model), before)


def test_only_gradients_that_training_needs_are_computed(steps):
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)), 0.5)
    ps.compact_payoff(model, torch.randn(2, 4))
    assert [len(each["compact"]()) for each in steps] == [2, 3]  # the data needs none
    model.requires_grad_(False)
    del steps[:]
    ps.compact_payoff(model, torch.randn(2, 4))
    assert not any(each["compact"]() for each in steps)


class Twice(nn.Module):
    """Uses a weight with different numbers of rows, and others in no layer or not at all."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.turned = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x, y=None):
        x = self.shared(torch.cat([self.shared(x), x]))
        return x @ self.turned.weight.t()


def test_times_of_a_weight_are_summed_over_its_calls(steps):
    model = ps.sparsify(Twice(), 0.5)
    table = ps.compact_payoff(model, {"x": torch.randn(3, 4)})
    rows = {row.name: row for row in table}
    shared = rows["shared.weight"]
    assert (shared.rows, shared.dense_ms, shared.masked_ms, shared.compact_ms) == (9, 2, 4, 1)
    assert (shared.ratio, shared.faster, shared.shape, shared.sparsity) == (
        0.5, "compact", (4, 4), 0.5,
    )  # fmt: skip
    for name in ("turned.weight", "idle.weight"):
        assert rows[name].reason
        assert (rows[name].dense_ms, rows[name].ratio, rows[name].faster) == (None, None, "")
    assert table.targets == ["shared.weight"]
    assert json.loads(json.dumps(table.to_dicts()))[0]["ratio"] == 0.5
    assert "not used" in repr(table)
    assert table._repr_html_().count("<tr>") == 4


def test_equal_layers_are_measured_once(steps):
    model = ps.sparsify(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), 0.5)
    assert len(ps.compact_payoff(model, torch.randn(2, 4))) == 5
    assert len(steps) == 2  # the input of the first one needs no gradient


@pytest.mark.parametrize(
    ("ms", "faster", "is_target"),
    [
        ((1.0, 1.5, 0.5), "compact", True),
        ((1.0, 1.5, 0.97), "equal", True),
        ((1.0, 1.5, 1.3), "dense", True),  # a mask is slower still
        ((1.0, 1.2, 1.3), "dense", False),
        ((1.0, 1.28, 1.3), "dense", True),  # within the noise
    ],
)
def test_the_table_says_what_is_faster_and_what_to_do(ms, faster, is_target, steps):
    steps.ms = ms
    model = ps.sparsify(nn.Linear(8, 8), 0.5)
    table = ps.compact_payoff(model, torch.randn(2, 8))
    assert table[0].faster == faster
    assert table.targets == (["weight"] if is_target else [])
    assert ('Faster with a mask: "weight"' in str(table)) == (not is_target)
    assert ("Slower than dense" in str(table)) == (faster == "dense" and is_target)
    ps.compact(model, table.targets)
    (target,) = masked_targets(model)
    assert target.is_compact == is_target


def test_no_dense_weight_is_made_of_a_very_large_one():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 100_000), nn.Linear(100_000, 100_000))
    ps.materialize(model, {"1.weight": 0.99999})
    (row,) = ps.compact_payoff(model, torch.randn(1, 4))
    assert (row.rows, row.compact_ms, row.faster) == (1, None, "")
    assert "too large" in row.reason


def test_autocast_around_the_call_is_measured(steps):
    model = ps.sparsify(nn.Linear(8, 8), 0.5)
    dtypes = []
    model.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ps.compact_payoff(model, torch.randn(2, 8))
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("outside", [False, True])
def test_each_layer_is_timed_under_the_autocast_of_its_call(outside, monkeypatch):
    class Inside(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self[0](x)
                with torch.autocast("cpu", enabled=False):
                    return self[1](x.float())

    found = []

    def timed(calls):
        states = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        found.append((*states, {run(call)[0].dtype for call in calls.values()}))
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(measure, "timed", timed)
    model = ps.sparsify(Inside(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        ps.compact_payoff(model, torch.randn(2, 8, requires_grad=True))
    assert found == [(True, False, {torch.float32}), (False, False, {torch.float32})]


def test_frozen_layers_are_measured_by_themselves(steps):
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    model = ps.sparsify(nn.Sequential(*layers), 0.5)
    model[1].requires_grad_(False)
    ps.compact_payoff(model, torch.randn(2, 4, requires_grad=True))
    assert [len(each["compact"]()) for each in steps] == [2, 1]


def test_a_compiled_model_is_measured_like_any_other(steps):
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)), 0.5)
    table = ps.compact_payoff(torch.compile(model, backend="eager"), torch.randn(2, 4))
    assert [(row.name.rpartition("_orig_mod.")[-1], row.rows) for row in table] == [
        ("0.weight", 2), ("2.weight", 2),
    ]  # fmt: skip
    assert model(torch.randn(3, 4)).shape == (3, 6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_rows_are_those_that_multiply_the_weight(steps):
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return self.weight @ x

    (row,) = ps.compact_payoff(ps.sparsify(Left(), 0.5), torch.randn(6, 3))
    assert row.rows == 3
    parts = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    (row,) = ps.compact_payoff(ps.sparsify(nn.Linear(4, 4), 0.5), parts)
    assert row.rows == 5


def test_models_that_cannot_be_compact_are_refused():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="masked weight"):
        ps.compact_payoff(nn.Linear(4, 4), x)
    gated = ps.sparsify(nn.Linear(4, 4), {"weight": ps.Gate()})
    with pytest.raises(RuntimeError, match="bool mask"):
        ps.compact_payoff(gated, x)
    model = ps.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.5)
    with pytest.raises(ValueError, match="reaches none"):
        ps.compact_payoff(model, x, targets="2.weight")
    assert [row.name for row in ps.compact_payoff(model, x, targets="1.weight")] == ["1.weight"]


def test_pairs_are_one_row(steps):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_re = nn.Parameter(torch.randn(4, 4))
            self.weight_im = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            linear = nn.functional.linear
            return linear(x, self.weight_re) + linear(x, self.weight_im)

    model = ps.sparsify(Complex(), 0.5)
    (row,) = ps.compact_payoff(copy.deepcopy(model), torch.randn(2, 4))
    assert (row.name, row.rows, row.compact_ms) == ("weight", 4, 1.0)
