"""The same training by one process and by several, each of which sees its part of a batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import parasparse as ps

shards_bool = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="its fully_shard takes no Parameters that are no floats"
)
BATCH = 12  # divides by 2 and by 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.wide(x)))


def net():
    """Layers whose rows neither 2 nor 3 processes can share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), Block(10), nn.Linear(10, 7)).double()


def batch(step, rank, world):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (BATCH,), generator=generator)
    return inputs.chunk(world)[rank], labels.chunk(world)[rank]


def alone(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model:
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_with_masks(model):
    return fsdp(ps.distributed.shard_masks(model))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def gradual(model, optimizer):
    rules = {"0": 0.5, "*": ps.Prune(0.8, scope="global")}
    schedule = ps.schedules.Cubic(0.0, 1.0, stop=40)
    return ps.GradualPruning(model, rules, optimizer, schedule=schedule, every=5)


def rigl(model, optimizer):
    return ps.rigl(model, 0.7, optimizer, stop=200, every=10, init="linear")


def sparse_momentum(model, optimizer):
    return ps.sparse_momentum(model, 0.7, optimizer, stop=200, every=10)


def set_(model, optimizer):
    return ps.sparse_evolutionary_training(model, 0.7, optimizer, every=10)


def trained(model, optimizer, controller, steps, rank=0, world=1):
    """Train; return the losses, averaged over processes."""
    losses = []
    for step in steps:
        inputs, labels = batch(step, rank, world)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if world > 1:
        dist.all_reduce(losses)
    return losses / world


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def masks_of(model):
    return {name: whole(mask).clone() for name, mask in ps.named_masks(model)}


def weights_of(model):
    return {name: whole(value).clone() for name, value in ps.dense_state_dict(model).items()}


def loss(model, step, rank=0, world=1):
    inputs, labels = batch(step, rank, world)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return nn.functional.cross_entropy(model(inputs.to(dtype)), labels)


def trains_as(model, alone, rank, steps=3):
    """Check that `model` trains as `alone` does."""
    mine, one = sgd(model), sgd(alone)
    for step in range(steps):
        for each, optimizer, args in (
            (model, mine, (rank, dist.get_world_size())),
            (alone, one, ()),
        ):
            optimizer.zero_grad()
            loss(each, step, *args).backward()
            optimizer.step()
    expected = weights_of(alone)
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, expected[name])
