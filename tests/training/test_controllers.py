"""What holds for each controller: it goes with any model, and goes on where it was left."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import parasparse as ps
from parasparse.schedules import Cubic, Every, Linear
from tests.helpers.cases import PairLinear, Tied
from tests.helpers.machine import need_bfloat16_lstm, need_inductor
from tests.helpers.processes import Program


def gradual(model, optimizer, rules):
    return ps.GradualPruning(model, rules, optimizer, schedule=Linear(0.0, 1.0, stop=4), every=2)


def evolutionary(model, optimizer, rules):
    return ps.sparse_evolutionary_training(model, rules, optimizer, every=2, init="constant")


def rigl(model, optimizer, rules):
    return ps.rigl(model, rules, optimizer, stop=8, every=2, init="constant")


def momentum(model, optimizer, rules):
    return ps.sparse_momentum(model, rules, optimizer, stop=8, every=2)


CONTROLLERS = [gradual, evolutionary, rigl, momentum]
MODELS = {
    "lstm": (lambda: nn.LSTM(6, 8), lambda: torch.randn(3, 2, 6)),
    "gru": (lambda: nn.GRU(6, 8, bidirectional=True), lambda: torch.randn(3, 2, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda: torch.randn(3, 2, 8)),
    "tied": (Tied, lambda: torch.randint(7, (3, 2))),
    "pair": (PairLinear, lambda: torch.randn(3, 6)),
    "complex": (
        lambda: nn.Linear(6, 4, dtype=torch.complex64),
        lambda: torch.randn(3, 6, dtype=torch.complex64),
    ),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
        lambda: torch.randn(3, 3, 5, 5),
    ),
}


def backward(model, x):
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    out.abs().float().square().mean().backward()


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("amp", [False, True], ids=["full", "bf16"])
def test_any_model_trains_with_accumulation_and_amp(controller, kind, amp):
    make, inputs = MODELS[kind]
    if amp and kind == "complex":
        pytest.skip("torch has no bfloat16 of complex numbers")
    if amp and kind == "lstm":
        need_bfloat16_lstm()
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    made = controller(model, optimizer, {"*": 0.75})
    start = {name: mask.clone() for name, mask in ps.named_masks(model)}
    for _ in range(6):
        for _ in range(2):  # gradients of two batches
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                backward(model, inputs())
        optimizer.step()
        optimizer.zero_grad()
        made.step()
    table = ps.summary(model)
    assert table.masked.sparsity == pytest.approx(0.75, abs=0.02)
    assert [update.step for update in made.history] == (
        [2, 4] if controller is gradual else [2, 4, 6]
    )
    assert any(not mask.equal(start[name]) for name, mask in ps.named_masks(model))
    before = copy.deepcopy(ps.dense_state_dict(model))
    for key, value in ps.squash(model).state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_compiled_step_needs_no_graph_per_update(controller):
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    made = controller(model, optimizer, 0.9)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(8):
        optimizer.zero_grad()
        compiled(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        made.step()
    # One more where the dense gradient of some steps is asked for.
    assert len(graphs) == (2 if controller is rigl else 1)
    assert ps.summary(model).masked.sparsity == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_is_eager_training(controller, backend):
    if backend == "inductor":
        need_inductor()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    compiled = copy.deepcopy(plain)
    batches = [torch.randn(8, 12) for _ in range(6)]
    for model in (plain, compiled):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        made = controller(model, optimizer, 0.8)
        run = torch.compile(model, backend=backend) if model is compiled else model
        for x in batches:
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
            made.step()
    for (name, one), (_, two) in zip(ps.named_masks(plain), ps.named_masks(compiled), strict=True):
        assert one.equal(two), name
        torch.testing.assert_close(ps.stored(plain, name), ps.stored(compiled, name))


def noisy(tensor, name):
    return tensor.abs() + 1e-3 * torch.rand_like(tensor)


def every_third(kind, model, optimizer):
    if kind == "gradual":
        rules, every = {"*": ps.Prune(0.9, score=noisy)}, Every(3, start=1)
        schedule = Cubic(0.0, 1.0, stop=12)
        return ps.GradualPruning(model, rules, optimizer, schedule=schedule, every=every)
    if kind == "evolutionary":
        return ps.sparse_evolutionary_training(model, 0.8, optimizer, every=3)
    if kind == "rigl":
        return ps.rigl(model, 0.8, optimizer, stop=16, every=3)
    return ps.sparse_momentum(model, 0.8, optimizer, stop=20, every=3)


def trained(first, last, read, write):
    """Train under each controller from epoch `first` to `last`, from what is in a file, to one."""
    states = {}
    for kind in (controller.__name__ for controller in CONTROLLERS):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(64, 12), torch.randint(4, (64,)))
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        controller = every_third(kind, model, optimizer)
        if read is not None:
            saved = torch.load(read, weights_only=True)[kind]
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            controller.load_state_dict(saved["controller"])
            torch.set_rng_state(saved["rng"])
        for _ in range(first, last):
            for x, y in DataLoader(data, batch_size=16, shuffle=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                controller.step()
        states[kind] = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "controller": controller.state_dict(), "rng": torch.get_rng_state(),
        }  # fmt: skip
    torch.save(states, write)


@pytest.mark.xdist_group("processes")
def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    trained(0, 5, None, tmp_path / "whole.pt")
    trained(0, 2, None, tmp_path / "half.pt")
    program = Program(tmp_path, trained, 2, 5, tmp_path / "half.pt", tmp_path / "rest.pt")
    code, _, error = program.finished()
    assert code == 0, error
    whole, rest = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "rest"))
    # Gradual pruning: at step 13, past its stop, for the last time.
    at = {"gradual": [1, 4, 7, 10, 13], "rigl": [3, 6, 9, 12, 15]}
    assert [*whole] == [controller.__name__ for controller in CONTROLLERS]
    for kind in whole:
        ours, theirs = (torch.utils._pytree.tree_leaves(saved[kind]) for saved in (whole, rest))
        assert len(ours) == len(theirs)
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(one, two) if torch.is_tensor(one) else one == two
        steps = [update["step"] for update in whole[kind]["controller"]["history"]]
        assert steps == at.get(kind, [3, 6, 9, 12, 15, 18])


@pytest.mark.parametrize("make", CONTROLLERS)
def test_a_state_that_lacks_an_entry_changes_nothing(make):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    controller = make(model, optimizer, 0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 8)).square().sum().backward()
        optimizer.step()
        controller.step()
    state, before = controller.state_dict(), copy.deepcopy(controller.state_dict())
    for entry in state.keys() - {"stop", "asked", "present"}:  # which older states lack
        other = {**copy.deepcopy(state), "steps": 99, "history": ()}
        del other[entry]
        with pytest.raises(KeyError, match=entry):
            controller.load_state_dict(other)
        after = controller.state_dict()
        assert all(torch.equal(before["start"][n], m) for n, m in after.pop("start").items())
        assert after == {k: v for k, v in before.items() if k != "start"}
