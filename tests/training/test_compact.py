"""Controllers change compact weights as they change masked ones."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parasparse as ps
from parasparse.attach.storing import give
from parasparse.counts import num_kept
from parasparse.integrations.end_of_training import Sparsest
from parasparse.schedules import Constant, Cubic, Linear
from parasparse.training.dynamic import block_growth
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl

NAMES = ["0.weight", "2.weight", "4.weight"]
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.01),
}


def build(sparsity=0.7):
    torch.manual_seed(0)
    layers = nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 10), nn.Tanh(), nn.Linear(10, 3)
    return ps.sparsify(nn.Sequential(*layers).double(), sparsity)


def batch():
    return torch.randn(6, 12, dtype=torch.float64)


def train(model, optimizer, controller, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    controller.step()


def values_of(model):
    return [model.get_parameter(f"{n}.parametrizations.weight.original") for n in (0, 2, 4)]


def dst(model, optimizer, **settings):
    chosen = {
        "prune": "magnitude", "growth": "gradient", "redistribution": "none", "prune_rate": 0.3,
        "every": 5, "init": "resume",
    } | settings  # fmt: skip
    return ps.DynamicSparsity(model, {"*": 0.7}, optimizer, **chosen)


@pytest.mark.parametrize(
    ("kind", "redistribution", "prune", "targets"),
    [
        ("AdamW", "none", "magnitude", None),
        ("SGD", "none", "SET", None),
        ("AdamW", "magnitude", "SET", None),
        ("SGD", "nonzero", "magnitude", None),
        ("AdamW", "nonzero", "global_magnitude", None),
        ("SGD", "magnitude", "global_magnitude", "2.weight"),
        ("AdamW", "magnitude", "magnitude", "2.weight"),
    ],
)
def test_dynamic_masks_are_those_of_the_masked_run(
    kind, redistribution, prune, targets, monkeypatch
):
    monkeypatch.setattr(block_growth, "BLOCK", 50)
    masked = build()
    compact = ps.compact(copy.deepcopy(masked), targets)
    runs = []
    for model in (masked, compact):
        optimizer = OPTIMIZERS[kind](model.parameters())
        controller = dst(model, optimizer, redistribution=redistribution, prune=prune)
        runs.append((model, optimizer, controller))
    for _ in range(50):
        x = batch()
        for run in runs:
            train(*run, x)
        assert runs[0][2].history == runs[1][2].history
        for name in NAMES:
            assert ps.mask_of(masked, name).equal(ps.mask_of(compact, name))
    assert len(runs[0][2].history) == 10
    torch.testing.assert_close(compact(x), masked(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_values_places_and_state_move_together(kind, growth):
    model = ps.compact(build())
    optimizer = OPTIMIZERS[kind](model.parameters())
    controller = dst(model, optimizer, growth=growth, redistribution="magnitude", every=3)
    parameters, kept = values_of(model), sum(map(len, values_of(model)))

    def dense():
        found = []
        for number, values in zip((0, 2, 4), values_of(model), strict=True):
            places = model[number].parametrizations.weight[0]
            held = {"value": values.detach(), "grad": values.grad, **optimizer.state[values]}
            tensors = {n: t for n, t in held.items() if t is not None and t.ndim}
            found.append({"mask": places.mask(), **{n: places(t) for n, t in tensors.items()}})
        return found

    for _ in range(9):
        optimizer.zero_grad()
        model(batch()).square().sum().backward()
        optimizer.step()
        before = dense()
        controller.step()
        for old, new in zip(before, dense(), strict=True):
            common = old["mask"] & new["mask"]
            assert old.keys() == new.keys()
            del old["mask"], new["mask"]
            assert all(tensor.equal(old[name] * common) for name, tensor in new.items())
        assert sum(map(len, values_of(model))) == kept == controller.baseline_nonzero
    assert all(a is b for a, b in zip(parameters, values_of(model), strict=True))
    assert all(update.churn > 0 for update in controller.history)


@given(st.integers(0, 2**32), st.floats(0.0, 1.0), st.floats(0.0, 0.97))
def test_random_growth_keeps_the_number_of_each_layer(seed, rate, sparsity):
    model = ps.compact(build(sparsity))
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = dst(model, optimizer, growth="random", prune="SET", prune_rate=rate, every=None)
    counts, memory = [[f(v) for v in values_of(model)] for f in (len, torch.Tensor.data_ptr)]
    model(batch()).sum().backward()
    for _ in range(2):
        controller.update()
        assert [len(values) for values in values_of(model)] == counts
        assert [int(ps.mask_of(model, name).sum()) for name in NAMES] == counts
    assert [values.data_ptr() for values in values_of(model)] == memory


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("redistribution", ["none", "magnitude"])
def test_a_run_resumes_bit_for_bit(growth, redistribution):
    def controlled(model):
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        settings = {"growth": growth, "redistribution": redistribution}
        return model, optimizer, dst(model, optimizer, **settings)

    run = controlled(ps.compact(build()))
    for _ in range(9):
        train(*run, batch())
    parts = [part.state_dict() for part in run]
    file = io.BytesIO()
    masks = {name: mask.clone() for name, mask in ps.named_masks(run[0])}
    torch.save({"parts": parts, "masks": masks, "rng": torch.get_rng_state()}, file)
    for _ in range(9):
        train(*run, batch())

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = controlled(ps.compact(ps.sparsify(ps.squash(build()), saved["masks"])))
    for part, state in zip(fresh, saved["parts"], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(saved["rng"])
    for _ in range(9):
        train(*fresh, batch())
    assert fresh[2].history == run[2].history
    one, two = (part[0].state_dict() for part in (run, fresh))
    assert all(one[key].equal(two[key]) for key in one)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


CONTROLLERS = {
    "SET": lambda m, o: dst(m, o, prune="SET", growth="random", every=1),
    "RigL": lambda m, o: dst(m, o, every=1),
    "RigL, magnitude": lambda m, o: dst(m, o, redistribution="magnitude", every=1),
    "gradual": lambda m, o: ps.GradualPruning(
        m, {"*": 0.995}, o, schedule=Linear(0.0, 1.0, stop=3), every=1
    ),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_nothing_is_as_large_as_the_dense_weight(name, monkeypatch):
    monkeypatch.setattr(block_growth, "BLOCK", 1 << 10)
    model = ps.compact(ps.sparsify(nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200)), 0.98))
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    with Largest() as largest:
        controller = CONTROLLERS[name](model, optimizer)
        for _ in range(3):
            train(model, optimizer, controller, torch.randn(4, 200))
    assert controller.history[-1].churn > 0
    assert largest.bytes < 200 * 200  # a mask; a weight is four times as large


def test_layers_train_that_would_not_fit_into_memory():
    model = ps.compact(ps.sparsify(nn.Linear(4, 4), 0.5))
    places = model.parametrizations.weight[0]
    places.shape = torch.Size((1_000_000, 4_000))
    places.move_to(torch.randint(places.shape.numel(), (20_000,)).unique())
    kept = len(places)
    give(model.parametrizations.weight.original, torch.randn(kept), None)
    give(model.bias, torch.zeros(1_000_000), None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    controller = ps.sparse_evolutionary_training(
        model, {"weight": 0.5}, optimizer, every=1, init="resume"
    )
    train(model, optimizer, controller, torch.randn(2, 4_000))
    assert len(model.parametrizations.weight.original) == kept
    assert controller.history[0].churn == pytest.approx(0.6 * kept / 4e9, rel=1e-2)
    assert places.positions().diff().min() > 0


RULES = {
    "local": {"*": 0.9},
    "global": {"*": ps.Prune(0.9, scope="global")},
    "erk": {"*": ps.Prune(0.9, distribution=ps.distributions.erk)},
    "two rules": {"0.weight": 0.95, "*": ps.Prune(0.8, max_sparsity=0.9)},
    "one is masked already": {"2.weight": 0.95},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("targets", [None, "2.weight"])
@pytest.mark.parametrize("kind", ["AdamW"])
def test_gradual_masks_are_those_of_a_masked_run_without_dropped_weights(rules, targets, kind):
    masked = build(0.5)
    compact = ps.compact(copy.deepcopy(masked), targets)
    runs = []
    for model in (masked, compact):
        optimizer = OPTIMIZERS[kind](model.parameters())
        schedule = Cubic(0.0, 1.0, stop=12)
        pruner = ps.GradualPruning(model, RULES[rules], optimizer, schedule=schedule, every=3)
        runs.append((model, optimizer, pruner))
    for _ in range(20):
        x = batch()
        for model, optimizer, pruner in runs:
            train(model, optimizer, pruner, x)
            with torch.no_grad():  # what is dropped must not come back
                for name in NAMES:
                    stored = ps.stored(model, name)
                    stored.mul_(ps.mask_of(model, name))
        for name in NAMES:
            assert ps.mask_of(masked, name).equal(ps.mask_of(compact, name))
    assert runs[0][2].history == runs[1][2].history
    for values in values_of(compact):
        states = [t for t in runs[1][1].state[values].values() if t.ndim]
        assert all(state.shape == values.shape for state in states)
    torch.testing.assert_close(compact(x), masked(x), rtol=1e-9, atol=1e-12)


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["local", "global"]))
@pytest.mark.filterwarnings("ignore:no entry is left")
def test_gradual_counts_are_exact_and_never_rise(start, asked, scope):
    model = ps.compact(build(start))
    masks = [int(mask.sum()) for _, mask in ps.named_masks(model)]
    pruner = ps.GradualPruning(
        model, {"*": ps.Prune(asked, scope=scope)}, schedule=Constant(1.0), every=1
    )
    pruner.step()
    kept = [int(mask.sum()) for _, mask in ps.named_masks(model)]
    sizes = [mask.numel() for _, mask in ps.named_masks(model)]
    assert [len(values) for values in values_of(model)] == kept
    if scope == "global":
        assert sum(kept) == min(num_kept(sum(sizes), asked), sum(masks))
    else:
        pairs = zip(sizes, masks, strict=True)
        assert kept == [min(num_kept(size, asked), before) for size, before in pairs]


def test_gradual_pruning_goes_on_after_compact_and_after_expand():
    masked, changed = build(0.5), build(0.5)
    runs = []
    for model in (masked, changed):
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        schedule = Cubic(0.0, 1.0, stop=12)
        pruner = ps.GradualPruning(model, {"*": 0.9}, optimizer, schedule=schedule, every=3)
        runs.append((model, optimizer, pruner))
    for step in range(15):
        x = batch()
        if step == 4:
            ps.compact(changed, optimizer=runs[1][1])
        if step == 10:
            state = runs[1][2].state_dict()
            runs[1][2].load_state_dict(state)
            ps.expand(changed, optimizer=runs[1][1])
        for run in runs:
            train(*run, x)
            with torch.no_grad():
                for name in NAMES:
                    ps.stored(run[0], name).mul_(ps.mask_of(run[0], name))
    assert runs[0][2].history == runs[1][2].history


def refused(**settings):
    return lambda model, optimizer: dst(model, optimizer, **settings)


weights_alone = ps.moves.needs("weights")(lambda masking, name, weight, mask: 1.0)
REFUSED = {
    "growth by momentum": (refused(growth="momentum"), r"`growth`.*state of entries.*expand"),
    "growth of neurons": (refused(growth="momentum_neuron"), "`growth`.*expand"),
    "global growth": (refused(growth="global_momentum_growth"), "`growth`.*expand"),
    "redistribution by momentum": (refused(redistribution="momentum"), "`redistribution`.*expand"),
    "a user's move": (refused(redistribution=lambda a, b, c, d: 1.0), "optimizer's state"),
    "a user's move of weights": (refused(redistribution=weights_alone), "dense shape"),
    "other first masks": (refused(init="erk"), '`init` must be "resume"'),
    "given first masks": (refused(init={"0.weight": 1}), '`init` must be "resume"'),
    "blocks": (
        lambda m, o: ps.rigl(
            m, {"*": ps.Prune(0.5, pattern=ps.patterns.block((2, 2)))}, o, stop=9, init="resume"
        ),
        "one by one.*expand",
    ),
    "reopen": (
        lambda m, o: ps.GradualPruning(m, 0.9, o, schedule=Constant(1.0), every=1, reopen=True),
        "`reopen`.*expand",
    ),
    "scores of the whole": (
        lambda m, o: ps.GradualPruning(
            m, ps.Prune(0.9, score=ps.scores.lamp), o, schedule=Constant(1.0), every=1
        ),
        "each entry alone.*expand",
    ),
    "channels": (
        lambda m, o: ps.GradualPruning(
            m, ps.Prune(0.9, pattern=ps.patterns.channel(0)), o, schedule=Constant(1.0), every=1
        ),
        "without a pattern.*expand",
    ),
    "tickets": (lambda m, o: ps.LotteryTicket(m, 0.9, o, rounds=2), "compact.*expand"),
    "gates": (lambda m, o: ps.ContinuousSparsification(m, ps.Gate(), steps=9), "compact.*expand"),
    "sparsify": (lambda m, o: ps.sparsify(m, 0.9), "compact.*expand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_dense_tensors_is_refused_and_nothing_changes(name):
    make, message = REFUSED[name]
    model = ps.compact(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        make(model, optimizer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_a_controller_of_masks_that_became_compact_says_so():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = dst(model, optimizer)
    ps.compact(model)
    with pytest.raises(RuntimeError, match="Create a new controller"):
        controller.step()


def test_an_update_waits_for_finite_gradients():
    model = ps.compact(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    controller = dst(model, optimizer, every=2)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        (model(batch()).sum() * factor).backward()
        controller.step()
    assert [update.step for update in controller.history] == [3]


def test_recording_lasts_for_the_step_before_an_update():
    model = ps.compact(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = dst(model, optimizer, every=2)
    with pytest.raises(RuntimeError, match="twice|once|already"):
        dst(model, optimizer, every=1), dst(model, optimizer, every=1)
    stack = model[0].parametrizations.weight
    recording = []
    for _ in range(4):
        recording.append(stack.recorder is not None)
        train(model, optimizer, controller, batch())
    assert recording == [False, True, False, True]
    train(model, optimizer, controller, batch())
    assert copy.deepcopy(model)[0].parametrizations.weight.recorder is None
    controller.close()
    assert stack.recorder is None


def test_compiled_models_grow_the_same_entries():
    runs = []
    for compiled in (False, True):
        model = ps.compact(build())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        controller = dst(model, optimizer, every=2)
        forward = model
        if compiled:
            forward = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            forward(batch()).square().sum().backward()
            optimizer.step()
            controller.step()
        runs.append((controller.history, dict(ps.named_masks(model))))
    assert runs[0][0] == runs[1][0]
    assert all(runs[0][1][name].equal(runs[1][1][name]) for name in NAMES)


def test_complex_weights_grow_as_masked_ones():
    torch.manual_seed(0)
    masked = ps.sparsify(nn.Linear(8, 6, dtype=torch.complex128), 0.7)
    runs = []
    for model in (masked, ps.compact(copy.deepcopy(masked))):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        runs.append((model, optimizer, dst(model, optimizer, every=2)))
    for _ in range(6):
        x = torch.randn(4, 8, dtype=torch.complex128)
        for model, optimizer, controller in runs:
            optimizer.zero_grad()
            model(x).abs().square().sum().backward()
            optimizer.step()
            controller.step()
    assert runs[0][2].history == runs[1][2].history
    assert ps.mask_of(runs[0][0], "weight").equal(ps.mask_of(runs[1][0], "weight"))


def test_a_masked_run_goes_on_with_compact_weights():
    masked = build()
    optimizer = torch.optim.SGD(masked.parameters(), 0.1)
    controller = dst(masked, optimizer, every=2)
    for _ in range(4):
        train(masked, optimizer, controller, batch())
    state = controller.state_dict()
    controller.close()
    ps.compact(masked, optimizer=optimizer)
    after = dst(masked, optimizer, every=2)
    after.load_state_dict(state)
    assert after.history == controller.history
    for _ in range(2):
        train(masked, optimizer, after, batch())
    start = {name: mask.clone() for name, mask in ps.named_masks(build())}
    kept = dict(ps.named_masks(masked))
    stayed = sum(int((mask & start[name]).sum()) for name, mask in kept.items())
    assert after.history[-1].overlap == stayed / after.baseline_nonzero
    assert Sparsest(after).total == pytest.approx(after.history[-1].total)
