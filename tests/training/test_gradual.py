import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse.counts import num_kept
from parasparse.schedules import Constant, Cubic, Every, Linear


def build():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.filterwarnings("ignore:no entry is left")
@given(
    st.floats(0, 1),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from(["local", "global"]),
)
def test_each_update_has_its_absolute_target(sparsity, stop, every, scope):
    model, schedule = build(), Cubic(0.2, 1.0, stop=stop)
    rules = {"*": ps.Prune(sparsity, scope=scope)}
    pruner = ps.GradualPruning(model, rules, schedule=schedule, every=every)

    def check(step):
        masks = dict(ps.named_masks(model))
        share = schedule(step) * sparsity
        if scope == "global":
            kept = sum(int(mask.sum()) for mask in masks.values())
            assert kept == num_kept(12 * 16 + 16 * 4, share)
        else:
            assert all(int(m.sum()) == num_kept(m.numel(), share) for m in masks.values())

    check(0)
    last = 0
    for step in range(1, 3 * stop):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        pruner.step()
        if step % every == 0 and last < stop:
            last = step
        check(last)
    assert [update.step for update in pruner.history] == list(range(every, last + 1, every))


def test_masks_are_those_of_the_stored_weights_whatever_was_dropped():
    model = nn.Linear(20, 20)
    falls = ps.GradualPruning(model, 0.9, schedule=Linear(1.0, 0.0, stop=4), every=1)
    for step in range(1, 5):
        with torch.no_grad():
            ps.stored(model, "weight").normal_()
        falls.step()
        dense = ps.sparsify(nn.Linear(20, 20), {"weight": 0.0})
        with torch.no_grad():
            ps.stored(dense, "weight").copy_(ps.stored(model, "weight"))
        ps.sparsify(dense, 0.9 * (1 - step / 4))
        assert torch.equal(ps.mask_of(model, "weight"), ps.mask_of(dense, "weight"))
    assert ps.mask_of(model, "weight").all()


def test_history_tells_what_changed():
    model = nn.Linear(10, 10)
    pruner = ps.GradualPruning(model, 0.5, schedule=Constant(1.0), every=1)
    start = ps.mask_of(model, "weight").clone()
    with torch.no_grad():
        ps.stored(model, "weight").copy_(torch.where(start, 0.1, 1.0))  # all others are larger now
    pruner.step()
    pruner.step()
    first, second = pruner.history
    assert (first.step, first.sparsity, first.churn, first.overlap) == (
        1,
        {"weight": 0.5},
        1.0,
        0.0,
    )
    assert (second.churn, second.overlap) == (0.0, 0.0)


def test_masks_stay_the_buffers_that_compiled_graphs_hold():
    model = build()
    pruner = ps.GradualPruning(model, 0.9, schedule=Linear(0.0, 1.0, stop=3), every=1)
    masks = [mask for _, mask in ps.named_masks(model)]
    pruner.step()
    assert all(a is b for a, (_, b) in zip(masks, ps.named_masks(model), strict=True))


@pytest.mark.parametrize(
    ("rules", "keywords", "text"),
    [
        (ps.Gate(init=0.0), {}, "must have a sparsity, which the controller scales"),
        ({"*": "zeros"}, {}, "must have a sparsity, which the controller scales"),
        ({"*": ps.Prune(pattern=ps.patterns.n_of_m(2, 4))}, {}, "which the controller scales"),
        ({"nowhere": 0.5}, {}, "must each reach a tensor"),
        (0.5, {"schedule": lambda step: 1.5}, r"`schedule\(0\)` must be in \[0, 1\]"),
        (0.5, {"schedule": lambda step: math.nan}, r"`schedule\(0\)` must be in"),
        (0.5, {"every": 0}, "`n` must be at least 1"),
        (
            0.5,
            {"optimizer": torch.optim.SGD(build().parameters())},
            'hold .*"0.weight", "2.weight"',
        ),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(rules, keywords, text):
    model = build()
    with pytest.raises(ValueError, match=text):
        ps.GradualPruning(model, rules, **{"schedule": Constant(1.0), "every": 1, **keywords})
    assert not ps.is_sparse(model)


def test_a_failed_update_leaves_masks_steps_and_history():
    model = build()
    pruner = ps.GradualPruning(
        model, 0.5, schedule=lambda step: 2.0 if step == 3 else 1.0, every=Every(1)
    )
    pruner.step()
    before = {name: mask.clone() for name, mask in ps.named_masks(model)}
    with torch.no_grad():
        ps.stored(model, "2.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        pruner.step()
    with torch.no_grad():
        ps.stored(model, "2.weight")[0, 0] = 0
    pruner.step()
    with pytest.raises(ValueError, match=r"`schedule\(3\)` must be in"):
        pruner.step()
    assert pruner.steps == len(pruner.history) == 2
    assert before.keys() == dict(ps.named_masks(model)).keys()


def test_a_state_of_other_tensors_is_refused():
    pruner = ps.GradualPruning(build(), 0.5, schedule=Constant(1.0), every=1)
    other = ps.GradualPruning(nn.Linear(3, 3), 0.5, schedule=Constant(1.0), every=1)
    with pytest.raises(ValueError, match=r'the tensors "weight \(3, 3\)", this controller "0.w'):
        pruner.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "take_off", [ps.unsparsify, ps.squash, lambda m, name: ps.deploy_masks(m, {name: None})]
)
def test_an_update_without_its_masks_is_refused_before_it_changes_others(take_off):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pruner = ps.GradualPruning(model, 0.5, schedule=Linear(0.0, 1.0, stop=2), every=1)
    take_off(model, "1.weight")
    with pytest.raises(RuntimeError, match=r'those of "1.weight" were removed, unset'):
        pruner.step()
    assert ps.mask_of(model, "0.weight").all()
    assert pruner.steps == 0


RESUMED = {  # stop and sparsity of the saved run, its steps; the schedule that goes on
    "longer": (10, 0.5, 12, Cubic(0.5, 1.0, start=12, stop=30), 30),
    "shorter": (100, 0.9, 60, Cubic(0.0, 1.0, stop=50), 65),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_goes_on_to_the_end_of_the_new_schedule(kind):
    stop, sparsity, steps, schedule, last = RESUMED[kind]
    model, again = nn.Linear(30, 30), nn.Linear(30, 30)
    first = ps.GradualPruning(model, sparsity, schedule=Cubic(0.0, 1.0, stop=stop), every=5)
    for _ in range(steps):
        first.step()
    other = ps.GradualPruning(again, 0.9, schedule=schedule, every=5)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(first.state_dict())
    for _ in range(40):
        other.step()
    assert ps.summary(again).masked.sparsity == 0.9
    assert other.history[-1].step == last


def test_a_finished_run_that_is_resumed_stays_finished():
    def build():
        return ps.GradualPruning(nn.Linear(30, 30), 0.5, schedule=Cubic(0.0, 1.0, stop=10), every=5)

    first, again = build(), build()
    for _ in range(12):
        first.step()
    again.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(first.state_dict())
    for _ in range(40):
        again.step()
    assert len(again.history) == len(first.history)
