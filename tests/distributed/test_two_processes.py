"""Two gloo processes on this machine."""

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import parasparse as ps

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def data(rank):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))


def loss(model, x):
    return model(x).pow(2).mean()


def ddp_wrapped_before_sparsify(rank):
    model = net()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    ps.sparsify(ddp, 0.5)
    alone = ps.sparsify(net(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss(ddp, data(rank)).backward()
        alone.zero_grad()
        ((loss(alone, data(0)) + loss(alone, data(1))) / 2).backward()
        for one, two in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
        optimizer.step()
        alone.load_state_dict(model.state_dict())


def ddp_forward_after_squash(rank):
    model = ps.sparsify(net(), 0.5)
    ddp = DistributedDataParallel(model)
    loss(ddp, data(rank)).backward()
    ps.squash(ddp)
    loss(ddp, data(rank)).backward()


def dense_gradients_are_averaged(rank):
    ddp = DistributedDataParallel(ps.sparsify(net(), 0.5))
    alone = ps.squash(ps.sparsify(net(), 0.5))
    ((loss(alone, data(0)) + loss(alone, data(1))) / 2).backward()
    with ps.dense_gradients(ddp) as grads:
        loss(ddp, data(rank)).backward()
        own = grads["0.weight"].clone()
    torch.testing.assert_close(grads["0.weight"], alone[0].weight.grad)
    torch.testing.assert_close(grads["2.weight"], alone[2].weight.grad)
    assert not torch.allclose(own, grads["0.weight"])


def gates_train_alike(rank):
    model = ps.sparsify(net(), ps.Gate(init=0.1))
    alone = ps.sparsify(net(), ps.Gate(init=0.1))
    ddp = DistributedDataParallel(model)
    (loss(ddp, data(rank)) + 1e-2 * ps.penalty(ddp)).backward()
    both = (loss(alone, data(0)) + loss(alone, data(1))) / 2
    (both + 1e-2 * ps.penalty(alone)).backward()
    for one, two in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    ps.squash(ddp)
    loss(ddp, data(rank)).backward()


def controllers_move_alike(rank):
    for make in (ps.sparse_momentum, ps.rigl):
        torch.manual_seed(0)
        model = net()
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
        dst = make(ddp, 0.5, optimizer, stop=100, every=2)
        for _ in range(4):
            optimizer.zero_grad()
            loss(ddp, data(rank)).backward()
            optimizer.step()
            dst.step()
        assert len(dst.history) == 2
        for _, mask in ps.named_masks(model):
            other = mask.int()
            dist.all_reduce(other)
            assert torch.equal(other, 2 * mask.int())


def fsdp2_matches_one_process(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    alone = ps.sparsify(net(), 0.5)
    model = ps.sparsify(net(), 0.5)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        out = loss(model, data(rank))
        torch.testing.assert_close(out, loss(alone, data(rank)))
        out.backward()
    loss(alone, data(0)).add(loss(alone, data(1))).backward()
    stored = ps.stored(model, "0.weight")
    torch.testing.assert_close(stored.grad.full_tensor(), ps.stored(alone, "0.weight").grad)
    with torch.no_grad():
        effective = model[0].weight
    assert isinstance(effective, DTensor)
    torch.testing.assert_close(effective.full_tensor(), alone[0].weight.detach())
    with pytest.raises(RuntimeError, match="before `fully_shard`"):
        ps.sparsify(model, {"0.bias": 0.5})
    dense = ps.dense_state_dict(model)
    torch.testing.assert_close(
        dense["0.weight"].full_tensor(), ps.dense_state_dict(alone)["0.weight"]
    )
    for verb in (ps.squash, ps.unsparsify):
        with pytest.raises(RuntimeError, match="dense_state_dict"):
            verb(model)
    ps.deploy_masks(model, {"0": torch.tensor(1.0)})  # masks themselves can change
    with torch.no_grad():
        assert model[0].weight.full_tensor().all()


def fsdp2_ranks_as_one_process_does(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, model = (ps.sparsify(net(), ps.Fixed(None)) for _ in range(2))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for rule in (0.5, ps.Prune(0.75, scope="global"), ps.Prune(pattern=ps.patterns.n_of_m(1, 4))):
        ps.sparsify(model, rule)
        ps.sparsify(alone, rule)
        for name, mask in ps.named_masks(model):
            assert torch.equal(mask, ps.mask_of(alone, name))


JOBS = [
    ddp_wrapped_before_sparsify,
    ddp_forward_after_squash,
    dense_gradients_are_averaged,
    gates_train_alike,
    controllers_move_alike,
    fsdp2_matches_one_process,
    fsdp2_ranks_as_one_process_does,
]


def _process(rank, port, job):
    warnings.simplefilter("ignore")  # torch's own, about gloo and CPU meshes
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    JOBS[job](rank)  # what it raises reaches the test through `spawn`
    dist.barrier()
    dist.destroy_process_group()
    # The job is done and checked. Threads of gloo that DDP's cycles keep alive may abort the
    # process while the interpreter shuts down ("terminate called without an active exception").
    os._exit(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("job", range(len(JOBS)), ids=[job.__name__ for job in JOBS])
def test_on_two_processes(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(port, job), nprocs=2)
