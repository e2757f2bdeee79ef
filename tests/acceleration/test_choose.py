"""What accelerate measures, chooses, reports and takes back."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.acceleration import measure
from parasparse.acceleration.installing import weights_in
from parasparse.acceleration.measure import Measured
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from tests.acceleration.test_accelerate import close, sparse, x
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl


def test_the_plan_says_what_was_measured_and_is_followed():
    model = ps.squash(ps.sparsify(nn.Sequential(nn.Linear(512, 1024), nn.ReLU()), 0.99))
    ps.accelerate(model, x(8, 512))
    table = ps.accelerated(model)
    assert [row.rows for row in table] == [1, 8, 64]
    assert all(row.name == "0.weight" and row.shape == (1024, 512) for row in table)
    assert all(abs(row.sparsity - 0.99) < 1e-3 for row in table)
    for row in table:
        assert 0 < row.chosen_ms <= row.dense_ms
        assert (row.format is None) == (row.chosen_ms == row.dense_ms)
    assert "chosen ms" in repr(table)
    assert table._repr_html_().count("<tr>") == 4
    saved = json.loads(json.dumps(table.plan))
    ps.restore(model)
    assert ps.accelerated(model) == ()
    again = ps.accelerated(ps.accelerate(model, formats=saved))
    assert [(r.name, r.rows, r.format) for r in again] == [
        (r.name, r.rows, r.format) for r in table
    ]
    assert json.loads(json.dumps(again.plan)) == saved
    assert again[0].dense_ms is None


def fake_times(monkeypatch, milliseconds):
    """Let the clock of the measurements say what each format takes."""

    def timed(calls):
        return {name: milliseconds.get(name, 9.0) for name in calls}

    monkeypatch.setattr(measure, "timed", timed)


class FakeClock:
    """A clock of the calls themselves, some of which another program disturbs."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(measure, "_clock", lambda: self.now)

    def call(self, seconds, disturbed):
        """Return a call of so many seconds, or of 50 times as many where `disturbed(n)`."""
        made = iter(range(1_000_000))
        return lambda: self.add(seconds * (50 if disturbed(next(made)) else 1))

    def add(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(
    "disturbed",
    [
        lambda n: False,
        lambda n: n < 4,
        lambda n: n % 2,
        lambda n: n % 5,  # most of the calls
        lambda n: n != 5,  # all but one
    ],
    ids=["never", "at first", "every other", "mostly", "nearly always"],
)
def test_a_busy_machine_does_not_change_the_choice(monkeypatch, disturbed):
    clock = FakeClock(monkeypatch)
    calls = {"dense": clock.call(2e-3, lambda n: False), "csr": clock.call(1e-3, disturbed)}
    assert measure.timed(calls) == pytest.approx({"dense": 2.0, "csr": 1.0})
    inside = [False]

    @contextmanager
    def sparse():
        inside[0] = True
        yield
        inside[0] = False

    for fast, slow, gains in ((1e-3, 2e-3, True), (2e-3, 1e-3, False)):
        ways = {True: clock.call(fast, disturbed), False: clock.call(slow, disturbed)}
        assert measure.gains(lambda ways=ways: ways[inside[0]](), sparse) == gains


def test_the_fastest_is_chosen_if_it_gains_more_than_noise(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    for times, chosen in [
        ({None: 1.0, "csr": 0.5, "bag": 0.4}, "bag"),
        ({None: 1.0, "csr": 0.97}, None),
        ({None: 1.0, "csr": 1.5}, None),
    ]:
        fake_times(monkeypatch, times)
        model, _, inputs = sparse("linear")
        ps.accelerate(model, inputs)
        assert {row.format for row in ps.accelerated(model)} == {chosen}
        assert len(list(weights_in(model))) == (chosen is not None)


def test_a_model_that_does_not_gain_as_a_whole_stays_dense(monkeypatch):
    fake_times(monkeypatch, {None: 1.0, "csr": 0.5})
    monkeypatch.setattr(measure, "gains", lambda *_: False)
    for name in ("linear", "lstm", "encoder"):
        model, _, inputs = sparse(name)
        ps.accelerate(model, inputs)
        assert not list(weights_in(model))
        assert {(r.format, r.chosen_ms) for r in ps.accelerated(model)} == {(None, 1.0)}


def test_a_weight_that_gains_only_at_other_rows_than_the_examples_stays_dense(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    monkeypatch.setattr(measure, "_fastest", lambda use, _: Measured(use.rows, *FAST[use.rows]))
    for rows in (8, 64):
        model = sparse("linear")[0]
        ps.accelerate(model, x(rows, 32))
        assert [r.format for r in ps.accelerated(model)] == (
            [None, None, None] if rows == 8 else [None, None, "csr"]
        )


FAST = {1: (None, 1.0, 1.0), 8: (None, 1.0, 1.0), 64: ("csr", 1.0, 0.5)}


def test_the_nearest_number_of_rows_decides():
    weight = nn.Parameter(torch.eye(64), requires_grad=False)
    made = SparseWeight(weight, ((1, "csr"), (8, "bag"), (64, None)))
    kinds = {n: getattr(made.format_for(n), "kind", None) for n in (1, 2, 3, 8, 22, 23, 999)}
    assert kinds == {1: "csr", 2: "csr", 3: "bag", 8: "bag", 22: "bag", 23: None, 999: None}


def test_measuring_leaves_buffers_hooks_and_modes_alone():
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Dropout(0.5))
    ps.squash(ps.sparsify(model, 0.99))
    model[2].eval()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    inputs = x(4, 512)
    torch.set_rng_state(drawn)
    ps.accelerate(model, {"input": inputs})
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_read_densely_as_well_keeps_its_dense_values(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    fake_times(monkeypatch, {None: 1.0, "csr": 0.5})
    model, _, inputs = sparse("tied")
    ps.accelerate(model, inputs, keep_dense=False)  # the embedding looks rows up
    assert model.head.weight.original is not None
    model, _, inputs = sparse("linear")
    ps.accelerate(model, inputs, keep_dense=False)
    assert model.weight.original is None


def test_what_was_replaced_is_no_longer_told_of():
    model, plan, _ = sparse("linear")
    ps.accelerate(model, formats=plan)
    model.load_state_dict(nn.Linear(32, 48).state_dict(), assign=True)
    assert ps.accelerated(model) == ()


def test_convolutions_go_back_to_dense_far_above_what_was_measured(monkeypatch):
    monkeypatch.setattr(measure, "gains", lambda *_: True)
    fake_times(monkeypatch, {None: 1.0, "csr": 0.5})
    model, _, inputs = sparse("conv2d, 1 x 1")
    ps.accelerate(model, inputs)
    rows = [(row.rows, row.format, row.dense_ms) for row in ps.accelerated(model)]
    assert rows == [(80, "csr", 1.0), (640, "csr", 1.0), (2560, None, None)]


def test_a_real_model_gains():
    vision = pytest.importorskip("torchvision")
    model = vision.models.resnet18(weights=None).eval()
    ps.squash(ps.sparsify(model, 0.98))
    dense, inputs = copy.deepcopy(model), x(1, 3, 64, 64)
    ps.accelerate(model, inputs)
    with torch.no_grad():
        close(model(inputs), dense(inputs))
    assert len(ps.accelerated(model)) >= 21
