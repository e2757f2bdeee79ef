"""Tensor parallelism, and FSDP2 over it: masks lie as their weights do."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import parasparse as ps
from tests.distributed.training import masks_of, sgd, weights_of, whole

PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def steps(model, optimizer, controller=None, number=4):
    for step in range(number):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if controller is not None:
            controller.step()


def alike(model, alone):
    expected, masks = weights_of(alone), masks_of(alone)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, expected[name])
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, masks[name])


def parallelized_and_sparsified(rank):
    mesh = init_device_mesh("cpu", (2,))
    alone, model = net(), parallelize_module(net(), mesh, PLAN)
    for rules in (0.5, ps.Prune(0.7, scope="global"), {"0": torch.eye(12, 8)}):
        for each in (alone, model):
            ps.sparsify(each, rules)
        assert all(isinstance(mask, DTensor) for _, mask in ps.named_masks(model))
        for each in (alone, model):
            steps(each, sgd(each), number=2)
        alike(model, alone)
    assert ps.mask_of(model, "0.weight").to_local().shape == (6, 8)
    ps.distributed.check(model)
    ps.squash(alone)
    ps.squash(model)
    for each in (alone, model):
        steps(each, sgd(each), number=2)
    alike(model, alone)


def controllers_choose_as_one_process_does(rank):
    mesh = init_device_mesh("cpu", (2,))
    for make in (
        lambda each, o: ps.rigl(each, 0.5, o, stop=100, every=2),
        lambda each, o: ps.sparse_momentum(each, 0.5, o, stop=100, every=2),
        lambda each, o: ps.GradualPruning(
            each, 0.8, o, schedule=ps.schedules.Cubic(0.0, 1.0, stop=6), every=2
        ),
    ):
        alone, model = net(), parallelize_module(net(), mesh, PLAN)
        for each in (alone, model):
            torch.manual_seed(rank if each is model else 0)
            optimizer = sgd(each)
            steps(each, optimizer, make(each, optimizer), number=8)
        alike(model, alone)


def draws_are_alike_on_all_meshes(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(net(), mesh["tp"], {"2": RowwiseParallel()})
    for index in (0, 2):
        fully_shard(model[index], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    torch.manual_seed(rank)
    ps.sparsify(model, {"0": ps.Prune(0.5, score=ps.scores.random)})
    ps.distributed.check(model)


def fully_sharded_over_it(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    alone, model = net(), parallelize_module(net(), mesh["tp"], PLAN)
    for each in (alone, model):
        ps.sparsify(each, 0.5)
    for index in (0, 2):
        fully_shard(model[index], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    for each in (alone, model):
        torch.manual_seed(rank if each is model else 0)
        optimizer = sgd(each)
        steps(each, optimizer, ps.sparse_momentum(each, 0.6, optimizer, stop=100, every=2))
        ps.sparsify(each, 0.8)
        steps(each, optimizer, number=2)
    alike(model, alone)
    with torch.no_grad():
        torch.testing.assert_close(whole(model[0].weight), alone[0].weight)


@pytest.mark.parametrize(
    "job", [parallelized_and_sparsified, controllers_choose_as_one_process_does]
)
def test_tensor_parallel(run, job):
    run(2, job)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="where() forgets how fully_shard cuts what others have cut"
)
def test_fsdp_over_tensor_parallel(run):
    run(4, fully_sharded_over_it)


def test_draws_on_two_meshes(run):
    run(4, draws_are_alike_on_all_meshes)
