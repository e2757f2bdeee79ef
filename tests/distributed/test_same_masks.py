"""Controllers choose the same masks, bit for bit, however many processes train."""

import functools

import pytest
import torch
import torch.distributed as dist

import parasparse as ps
from tests.distributed.training import (
    alone,
    ddp,
    fsdp,
    fsdp_with_masks,
    gradual,
    masks_of,
    net,
    rigl,
    set_,
    sgd,
    shards_bool,
    sparse_momentum,
    trained,
)

STEPS = 50


def run_of(wrap, control, rank=0, world=1):
    """Train; return losses, masks and the history."""
    model = ps.sparsify(net(), 0.0)
    torch.manual_seed(rank)  # what is drawn must not depend on it
    model = wrap(model)
    optimizer = sgd(model)
    controller = control(model, optimizer)
    losses = trained(model, optimizer, controller, range(STEPS), rank, world)
    if world > 1:
        ps.distributed.check(model)
    return losses, masks_of(model), controller.history


@functools.cache
def of_one_process(control):
    return run_of(alone, control)


def as_one_process_does(rank, wrap, control, expected):
    losses, masks, history = run_of(wrap, control, rank, dist.get_world_size())
    torch.testing.assert_close(losses, expected[0])
    assert masks.keys() == expected[1].keys()
    for name, mask in masks.items():
        assert torch.equal(mask, expected[1][name]), name
    assert [update.sparsity for update in history] == [u.sparsity for u in expected[2]]
    assert [update.churn for update in history] == [u.churn for u in expected[2]]
    assert len(history) >= 5
    assert any(update.churn for update in history)


EVERY = [gradual, rigl, sparse_momentum, set_]
CASES = [
    *[(2, ddp, control) for control in EVERY],
    *[(2, fsdp, control) for control in EVERY],
    *[(3, fsdp, control) for control in EVERY[:3]],
    *[(2, fsdp_with_masks, control) for control in EVERY[:2]],
    (3, fsdp_with_masks, sparse_momentum),
]


@pytest.mark.parametrize(
    ("processes", "wrap", "control"),
    [
        pytest.param(*case, marks=shards_bool if case[1] is fsdp_with_masks else ())
        for case in CASES
    ],
    ids=[f"{wrap.__name__}-{n}-{control.__name__}" for n, wrap, control in CASES],
)
def test_masks_and_losses_are_those_of_one_process(run, processes, wrap, control):
    run(processes, as_one_process_does, wrap, control, of_one_process(control))
