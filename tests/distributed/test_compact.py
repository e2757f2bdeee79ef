"""Compact weights in several processes."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import parasparse as ps
from tests.distributed.training import alone, batch, net


def compact_net():
    return ps.compact(ps.sparsify(net(), 0.7))


def trained(model, rank, world, steps=3):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        inputs, labels = batch(step, rank, world)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def ddp_trains_as_one_process(rank):
    model = compact_net()
    trained(DistributedDataParallel(model), rank, 2)
    want = trained(alone(compact_net()), 0, 1).state_dict()
    torch.testing.assert_close(model.state_dict(), want)
    return [value.tolist() for value in model.state_dict().values()]


def wrapped_in_ddp_it_keeps_its_shapes(rank):
    model = compact_net()
    ddp = DistributedDataParallel(model)
    for verb in (ps.squash, ps.unsparsify, ps.expand):
        with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*\.module"):
            verb(ddp)
    want = model(batch(0, 0, 1)[0])
    assert ddp(batch(0, 0, 1)[0]).equal(want)
    torch.testing.assert_close(ps.squash(model)(batch(0, 0, 1)[0]), want)


def sharded_it_is_refused(rank):
    model = fully_shard(compact_net(), mesh=init_device_mesh("cpu", (2,)))
    for use in (lambda model: model[0].weight, ps.expand, ps.dense_state_dict):
        with pytest.raises(RuntimeError, match=r"must not be sharded.*expand"):
            use(model)
    with pytest.raises(RuntimeError, match="must be squashed before `fully_shard`"):
        ps.squash(model)


def test_ddp_gives_the_same_weights_on_every_rank(run):
    first, second = run(2, ddp_trains_as_one_process)
    assert first == second


@pytest.mark.parametrize("job", [wrapped_in_ddp_it_keeps_its_shapes, sharded_it_is_refused])
def test_wrapped_and_sharded(run, job):
    run(2, job)
