"""What TensorBoard reads of what we write."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import parasparse as ps
from parasparse.integrations.tensorboard import SparsityWriter


def test_the_updates_of_a_controller_are_read_again(tmp_path):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5))
    schedule = ps.schedules.Linear(0.0, 1.0, stop=9)
    pruner = ps.GradualPruning(model, {"0": 0.9, "1": 0.4}, schedule=schedule, every=3)
    with SummaryWriter(tmp_path) as writer:
        log = SparsityWriter(writer, pruner)
        for _ in range(12):
            pruner.step()
            log.step()
        log.step()  # nothing new
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "sparsity/total", "sparsity/churn", "sparsity/overlap",
        "tensors/0.weight", "tensors/1.weight",
    }  # fmt: skip
    for tag, value in [
        ("sparsity/total", lambda update: update.total),
        ("sparsity/churn", lambda update: update.churn),
        ("tensors/0.weight", lambda update: update.sparsity["0.weight"]),
    ]:
        read = events.Scalars(tag)
        assert [event.step for event in read] == [3, 6, 9]
        assert [event.value for event in read] == pytest.approx([value(u) for u in pruner.history])
    zeros = sum(int((layer.weight == 0).sum()) for layer in model)
    assert pruner.history[-1].total == pytest.approx(zeros / 150)


def test_rounds_are_written_at_the_step_that_is_given(tmp_path):
    model = nn.Linear(10, 10)
    lottery = ps.LotteryTicket(model, 0.75, rounds=2)
    with SummaryWriter(tmp_path) as writer:
        log = SparsityWriter(writer, lottery)
        for epoch in (7, 14):
            with torch.no_grad():
                ps.stored(model, "weight").normal_()
            lottery.prune()
            log.step(epoch)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("sparsity/total")
    assert [(event.step, event.value) for event in events] == [(7, 0.5), (14, 0.75)]
