import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parasparse as ps
from parasparse._checks import num_kept
from parasparse.schedules import Constant, Cubic, Every, Linear
from tests.cases import PairLinear, Tied


def build():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


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
    ("make", "inputs"),
    [
        (lambda: nn.LSTM(6, 8), lambda: torch.randn(3, 2, 6)),
        (lambda: nn.GRU(6, 8, bidirectional=True), lambda: torch.randn(3, 2, 6)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), lambda: torch.randn(3, 2, 8)),
        (Tied, lambda: torch.randint(7, (3, 2))),
        (PairLinear, lambda: torch.randn(3, 6)),
        (lambda: nn.Linear(6, 4, dtype=torch.complex64), lambda: torch.randn(3, 6) + 0j),
    ],
    ids=["lstm", "gru", "attention", "tied", "pair", "complex"],
)
@pytest.mark.parametrize("amp", [False, True], ids=["full", "bf16"])
def test_any_model_trains_with_accumulation_and_amp(make, inputs, amp):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = ps.GradualPruning(
        model, {"*": 0.75}, optimizer, schedule=Linear(0.0, 1.0, stop=4), every=2
    )
    first = inputs()
    if amp and first.is_complex():
        pytest.skip("torch has no bfloat16 of complex numbers")
    for _ in range(4):
        for _ in range(2):  # gradients of two batches
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                out = model(inputs())
            out = out[0] if isinstance(out, tuple) else out
            out.abs().float().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    for row in ps.summary(model).rows:
        assert row.sparsity == pytest.approx(0.75, abs=0.02)
    assert len(pruner.history) == 2
    before = copy.deepcopy(ps.dense_state_dict(model))
    for key, value in ps.squash(model).state_dict().items():
        assert torch.equal(value, before[key])


def test_a_compiled_step_needs_no_new_graph():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = ps.GradualPruning(model, 0.9, optimizer, schedule=Cubic(0.0, 1.0, stop=5), every=1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(6):
        optimizer.zero_grad()
        compiled(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert len(graphs) == 1
    assert ps.summary(model).masked.sparsity == pytest.approx(0.9, abs=0.01)


PROGRAM = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import parasparse as ps
from parasparse.schedules import Cubic, Every

first, last, read, write = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 12), torch.randint(4, (64,)))
model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
pruner = ps.GradualPruning(
    model, {"*": ps.Prune(0.9, score=lambda t, n: t.abs() + 1e-3 * torch.rand_like(t))}, optimizer,
    schedule=Cubic(0.0, 1.0, stop=12), every=Every(3, start=1),
)
if read != "-":
    saved = torch.load(read, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    pruner.load_state_dict(saved["pruner"])
    torch.set_rng_state(saved["rng"])
for epoch in range(first, last):
    for x, y in DataLoader(data, batch_size=16, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
torch.save({
    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
    "pruner": pruner.state_dict(), "rng": torch.get_rng_state(),
}, write)
"""


def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    def run(*arguments):
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            check=True,
            cwd=Path(__file__).parent.parent,
        )

    run(0, 5, "-", tmp_path / "whole.pt")
    run(0, 2, "-", tmp_path / "half.pt")
    run(2, 5, tmp_path / "half.pt", tmp_path / "rest.pt")
    whole, rest = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "rest"))
    ours, theirs = (torch.utils._pytree.tree_leaves(saved) for saved in (whole, rest))
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two
    assert len(whole["pruner"]["history"]) == 5  # steps 1, 4, 7, 10, and 13 is past the stop


@pytest.mark.parametrize(
    ("rules", "keywords", "text"),
    [
        (ps.Gate(init=0.0), {}, "a sparsity that the schedule can scale"),
        ({"*": "zeros"}, {}, "a sparsity that the schedule can scale"),
        ({"*": ps.Prune(pattern=ps.patterns.n_of_m(2, 4))}, {}, "can scale"),
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
    with pytest.raises(ValueError, match='the tensors "weight", this controller "0.weight"'):
        pruner.load_state_dict(other.state_dict())
