"""torch.distributed.checkpoint: other numbers of processes, and a process that dies."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import parasparse as ps
from tests.distributed.training import (
    alone,
    fsdp,
    fsdp_with_masks,
    gradual,
    masks_of,
    net,
    rigl,
    sgd,
    shards_bool,
    sparse_momentum,
    trained,
    weights_of,
    whole,
)
from tests.helpers.processes import Processes

SAVED, STEPS = 15, 30


class Training:
    """A model, an optimizer and a controller, which are saved together."""

    def __init__(self, wrap, control):
        self.model = wrap(ps.sparsify(net(), 0.0))
        self.optimizer = sgd(self.model)
        self.controller = control(self.model, self.optimizer)

    def run(self, steps, rank, world):
        return trained(self.model, self.optimizer, self.controller, steps, rank, world)

    def state(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "controller": self.controller.state_dict()}

    def save(self, path):
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path):
        state = self.state()
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.controller.load_state_dict(state["controller"])

    def told(self):
        """Return everything that a checkpoint holds, whole."""
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in trainable(self.model)]
        return {
            "masks": masks_of(self.model),
            "weights": weights_of(self.model),
            "momenta": [whole(momentum).clone() for momentum in momenta],
            "history": list(self.controller.history),
            "steps": self.controller.steps,
        }


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def same(one, two):
    assert one["masks"].keys() == two["masks"].keys()
    for what in ("masks", "weights"):
        for name, tensor in one[what].items():
            assert torch.equal(tensor, two[what][name]), name
    assert all(map(torch.equal, one["momenta"], two["momenta"]))
    assert (one["history"], one["steps"]) == (two["history"], two["steps"])


def saves(rank, path, wrap, control):
    """Train, save half-way, train on; return what was saved, and what came of it."""
    training = Training(wrap, control)
    training.run(range(SAVED), rank, 2)
    training.save(path)
    saved = training.told()
    losses = training.run(range(SAVED, STEPS), rank, 2)
    return saved, losses, training.told()


def loads(rank, path, wrap, control, saved):
    """Load; train on; return what came of it."""
    training = Training(wrap, control)
    training.load(path)
    same(training.told(), saved)
    world = dist.get_world_size() if dist.is_initialized() else 1
    return training.run(range(SAVED, STEPS), rank, world), training.told()


def dies(rank, path, wrap, control):
    training = Training(wrap, control)
    training.run(range(SAVED), rank, 2)
    training.save(path)
    training.run(range(SAVED, SAVED + 3), rank, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    training.run(range(SAVED + 3, STEPS), rank, 2)


CASES = [
    (fsdp, gradual),
    (fsdp, rigl),
    pytest.param(fsdp_with_masks, sparse_momentum, marks=shards_bool),
]


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it will remove
@pytest.mark.parametrize(("wrap", "control"), CASES)
def test_a_checkpoint_of_two_processes_loads_on_one_two_and_three(run, tmp_path, wrap, control):
    saved, losses, last = run(2, saves, tmp_path, wrap, control)[0]
    for found in run(2, loads, tmp_path, wrap, control, saved):
        assert torch.equal(found[0], losses)
        same(found[1], last)  # bit for bit
    others = [loads(0, tmp_path, alone, control, saved)]
    if control is rigl:  # one is enough
        others += run(3, loads, tmp_path, wrap, control, saved)
    for found in others:
        torch.testing.assert_close(found[0], losses)
        for name, mask in last["masks"].items():
            assert torch.equal(found[1]["masks"][name], mask)


def test_the_others_fail_when_a_process_is_killed_and_the_next_go_on(run, tmp_path):
    saved, losses, last = run(2, saves, tmp_path / "whole", fsdp, rigl)[0]
    doomed = Processes(2)
    try:
        errors = doomed.run_to_the_end(dies, tmp_path / "cut", fsdp, rigl)
    finally:
        doomed.close()
    assert errors[1] == "the process died"
    assert errors[0] not in (None, "the process died")  # torch's own error
    for found in run(2, loads, tmp_path / "cut", fsdp, rigl, saved):
        assert torch.equal(found[0], losses)
        same(found[1], last)
