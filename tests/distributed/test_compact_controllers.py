"""Compact weights under DistributedDataParallel, which must be wrapped after `compact`."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import parasparse as ps
from parasparse.schedules import Constant
from tests.helpers.machine import needs_mkl

pytestmark = needs_mkl


def build():
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)
    return ps.compact(ps.sparsify(nn.Sequential(*layers).double(), 0.7))


def run_of(model, growth, batches):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    controller = ps.DynamicSparsity(
        model, {"*": 0.7}, optimizer, growth=growth, redistribution="none", every=2, init="resume"
    )
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        controller.step()
    return controller.history, dict(ps.named_masks(model)), dict(model.named_parameters())


def all_processes_grow_the_same_entries(rank, growth):
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(8, 6, 8, generator=generator, dtype=torch.float64)
    model = DistributedDataParallel(build())
    torch.manual_seed(rank)
    halves = [x.chunk(2)[rank] for x in batches]
    history, masks, parameters = run_of(model, growth, halves)
    assert all(update.churn > 0 for update in history)
    found = [None, None]
    dist.all_gather_object(found, [*masks.values(), *(p.detach() for p in parameters.values())])
    assert all(one.equal(two) for one, two in zip(*found, strict=True))
    if growth == "gradient":  # as one process does for the whole batch
        alone_history, alone_masks, _ = run_of(build(), growth, batches)
        assert history == alone_history
        assert all(mask.equal(alone_masks[name]) for name, mask in masks.items())


def all_processes_wait_for_finite_gradients(rank):
    model = DistributedDataParallel(build())
    factors = [1.0, float("inf") if rank else 1.0, 1.0]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    controller = ps.DynamicSparsity(
        model, {"*": 0.7}, optimizer, growth="gradient", redistribution="none", every=2,
        init="resume",
    )  # fmt: skip
    for factor in factors:
        (model(torch.ones(2, 8, dtype=torch.float64)).sum() * factor).backward()
        optimizer.zero_grad()
        controller.step()
    assert [update.step for update in controller.history] == [3]


def changes_of_size_are_refused(rank):
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="must not change inside a DistributedDataParallel"):
        ps.GradualPruning(model, 0.9, optimizer, schedule=Constant(1.0), every=1)
    for settings in ({"redistribution": "magnitude"}, {"prune": "global_magnitude"}):
        chosen = {"growth": "random", "redistribution": "none", "init": "resume"} | settings
        with pytest.raises(RuntimeError, match="must not change inside a DistributedDataParallel"):
            ps.DynamicSparsity(model, {"*": 0.7}, optimizer, **chosen)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_all_processes_grow_the_same_entries(run, growth):
    run(2, all_processes_grow_the_same_entries, growth)


@pytest.mark.parametrize(
    "job", [all_processes_wait_for_finite_gradients, changes_of_size_are_refused]
)
def test_under_ddp(run, job):
    run(2, job)
