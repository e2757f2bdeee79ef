import math
import re

import pytest
import torch
from hypothesis import assume, given
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
    "sparser": (10, 0.5, 12, Cubic(0.0, 1.0, stop=10), 15),
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


def masked(model, rules):
    return ps.sparsify(model, rules)


def with_zeros(model, rules):
    return ps.squash(ps.sparsify(model, rules))


@pytest.mark.filterwarnings("ignore:no entry is left")
@given(
    st.floats(0, 1), st.floats(0, 1), st.integers(1, 12), st.integers(0, 3),
    st.sampled_from([masked, with_zeros]), st.sampled_from(["local", "global"]),
)  # fmt: skip
def test_what_is_sparse_is_never_opened(present, asked, stop, start, sparse, scope):
    model = sparse(build(), {"*": ps.Prune(present, scope=scope)})
    before = {n: mask.clone() for n, mask in ps.named_masks(ps.sparsify(model, {"*": "zeros"}))}
    assume(all(mask.any() for mask in before.values()))  # a tensor of zeros is a new one
    if sparse is with_zeros:
        ps.squash(model)
    schedule = Cubic(0.0, 1.0, start=start, stop=start + stop)
    rules = {"*": ps.Prune(asked, scope=scope)}
    pruner = ps.GradualPruning(model, rules, schedule=schedule, every=1)
    assert all(mask.equal(before[name]) for name, mask in ps.named_masks(model))

    def zeros(masks):
        counts = {name: (int((~mask).sum()), mask.numel()) for name, mask in masks.items()}
        return (
            {"": tuple(map(sum, zip(*counts.values(), strict=True)))}
            if scope == "global"
            else counts
        )

    first = zeros(before)
    for step in range(1, start + stop + 3):
        pruner.step()
        share = schedule(min(step, start + stop))
        for name, (count, numel) in zeros(dict(ps.named_masks(model))).items():
            p = first[name][0] / numel
            wanted = numel - num_kept(numel, p + share * (max(p, asked) - p))
            assert abs(count - wanted) <= 1
            assert count >= first[name][0]
    # Without training, what is dropped stays dropped.
    assert not any((mask & ~before[name]).any() for name, mask in ps.named_masks(model))


def test_masks_stay_as_they_are_until_the_schedule_rises():
    mask = torch.rand(20, 20) > 0.6  # not of the largest entries
    model = ps.sparsify(nn.Linear(20, 20), {"weight": mask})
    schedule = Cubic(0.0, 1.0, start=4, stop=8)
    pruner = ps.GradualPruning(model, 0.9, schedule=schedule, every=2)
    for step in range(1, 7):
        assert ps.mask_of(model, "weight").equal(mask), step
        pruner.step()
    assert pruner.history[-1].total > 1 - float(mask.float().mean())


def test_a_layer_that_starts_at_zero_is_open():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    nn.init.zeros_(model[1].weight)
    ps.GradualPruning(model, 0.5, schedule=Cubic(0.0, 1.0, stop=8), every=2)
    assert ps.mask_of(model, "1.weight").all()


@pytest.mark.parametrize("sparse", [masked, with_zeros])
def test_a_sparse_model_is_opened_if_asked(sparse):
    model = sparse(build(), {"*": 0.7})
    schedule = Cubic(0.0, 1.0, stop=8)
    pruner = ps.GradualPruning(model, {"*": 0.8}, schedule=schedule, every=1, reopen=True)
    assert ps.summary(model).masked.sparsity == 0
    for _ in range(8):
        pruner.step()
    assert ps.summary(model).masked.sparsity == pytest.approx(0.8, abs=0.01)


def test_channels_that_are_gone_stay_gone():
    conv = nn.Conv2d(3, 20, 3)
    channels = ps.Prune(0.6, pattern=ps.patterns.channel(0))
    ps.squash(ps.sparsify(conv, {"weight": channels}))
    rules = {"weight": ps.Prune(0.8, pattern=ps.patterns.channel(0))}
    pruner = ps.GradualPruning(conv, rules, schedule=Linear(0.0, 1.0, stop=2), every=1)
    kept = [int(ps.mask_of(conv, "weight")[:, 0, 0, 0].sum())]
    for _ in range(2):
        pruner.step()
        kept.append(int(ps.mask_of(conv, "weight")[:, 0, 0, 0].sum()))
    assert kept == [8, 6, 4]


def test_a_distribution_is_where_a_sparse_model_ends():
    asked = ps.distributions.erk({"0.weight": (16, 12), "2.weight": (4, 16)}, 0.8)
    model = with_zeros(build(), {"*": 0.3})
    rules = {"*": ps.Prune(0.8, distribution=ps.distributions.erk)}
    pruner = ps.GradualPruning(model, rules, schedule=Linear(0.0, 1.0, stop=4), every=1)
    for _ in range(4):
        pruner.step()
    for name, mask in ps.named_masks(model):
        assert 1 - float(mask.float().mean()) == pytest.approx(max(0.3, asked[name]), abs=0.02)


@pytest.mark.parametrize("initial", [0.0, 0.2])
def test_a_resumed_run_starts_from_where_the_first_one_did(initial):
    def start(model):
        schedule = Cubic(initial, 1.0, stop=10)
        return ps.GradualPruning(model, {"*": 0.9}, schedule=schedule, every=1)

    model = with_zeros(build(), {"*": 0.5})
    again = ps.sparsify(build(), {"*": 0.0})
    straight = start(model)
    for _ in range(5):
        straight.step()
    again.load_state_dict(model.state_dict())
    resumed = start(again)  # it finds more zeros than there were
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(straight.state_dict())
    for _ in range(5):
        straight.step()
        resumed.step()
    assert resumed.history == straight.history
    assert straight.history[-1].total == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("steps", "keywords", "text"),
    [
        (0, {}, r"sparsity is 0.0% after 0 steps; the schedule reaches 80.0% .* step 20\."),
        (12, {}, r"sparsity is 48.0% after 12 steps; the schedule reaches 80.0%"),
        (20, {"every": 3}, r"after 20 steps; the schedule reaches 80.0%"),
        (20, {}, None),
        (3, {"schedule": Constant(1.0)}, None),
        (3, {"schedule": lambda step: 0.5}, None),  # who knows when that ends
    ],
)
def test_it_says_what_is_missing_when_training_ends(steps, keywords, text):
    given = {"schedule": Linear(0.0, 1.0, stop=20), "every": 1, **keywords}
    pruner = ps.GradualPruning(nn.Linear(20, 20), 0.8, **given)
    for _ in range(steps):
        pruner.step()
    if text is None:
        assert pruner.unfinished() == ""
    else:
        assert re.search(text, pruner.unfinished())


def test_nothing_is_missing_if_the_model_was_sparser_than_asked():
    model = with_zeros(nn.Linear(20, 20), 0.9)
    pruner = ps.GradualPruning(model, 0.5, schedule=Linear(0.0, 1.0, stop=20), every=1)
    assert pruner.unfinished() == ""
