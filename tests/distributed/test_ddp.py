"""DistributedDataParallel: wrapped before or after, squashed while it trains."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import parasparse as ps


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
    alone = ps.squash(ps.sparsify(net(), 0.5))
    ddp.zero_grad()
    loss(ddp, data(rank)).backward()
    ((loss(alone, data(0)) + loss(alone, data(1))) / 2).backward()
    for one, two in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


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


def statistics_are_summed(rank):
    """What two processes collect is what one collects of both their batches."""
    scores = ps.scores
    for wrap in (lambda model: model, lambda model: ps.sparsify(model, {"0": 0.5})):
        alone = wrap(net())
        with scores.collect(alone) as expected:
            for each in range(2):
                loss(alone, data(each)).backward()
        ddp = DistributedDataParallel(wrap(net()))
        with scores.collect(ddp) as found:
            loss(ddp, data(rank)).backward()
        for name in ("0.weight", "2.weight"):
            for what in ("gradient", "squared_gradient", "movement", "input_norm"):
                torch.testing.assert_close(
                    getattr(found, what)(name), getattr(expected, what)(name)
                )


def statistics_of_what_one_process_does_not_reach(rank):
    torch.manual_seed(0)
    layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, key):
            return self.layers[key](x)

    ddp = DistributedDataParallel(Switch(), find_unused_parameters=True)
    with ps.scores.collect(ddp) as found:
        ddp(torch.ones(2, 4), "ab"[rank]).sum().backward()
    torch.testing.assert_close(found.gradient("layers.a.weight"), torch.full((4, 4), 2.0))
    torch.testing.assert_close(found.input_norm("layers.b.weight"), torch.full((1, 4), 2.0**0.5))


def grams_are_summed(rank):
    """Two processes have the same bits, and the mask that one has with both their inputs."""
    inputs = [data(each).repeat(8, 1) + torch.randn(32, 8) for each in range(2)]
    dist.broadcast(inputs[0], 0)
    dist.broadcast(inputs[1], 0)
    alone, prune = net(), ps.OneShot(0.5)
    ddp = DistributedDataParallel(net())
    with torch.no_grad(), ps.scores.collect(alone, grams=True) as expected:
        alone(torch.cat(inputs))
    with torch.no_grad(), ps.scores.collect(ddp, grams=True) as found:
        if rank == 0:
            ddp.module[0](inputs[0])  # another number of inputs, which share nothing
        else:
            ddp(inputs[1])
        if rank == 0:
            ddp.module[2](ddp.module[1](ddp.module[0](inputs[0])))
    assert found.count("0.weight") == 96
    with torch.no_grad(), ps.scores.collect(ddp, grams=True) as found:
        ddp(inputs[rank])
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(found.gram(name), expected.gram(name))
        assert found.count(name) == 64
        every = [torch.empty_like(found.gram(name)) for _ in range(2)]
        dist.all_gather(every, found.gram(name))
        assert torch.equal(*every)
    ps.sparsify(alone, dataclasses.replace(prune, statistics=expected))
    ps.sparsify(ddp, dataclasses.replace(prune, statistics=found))
    ps.distributed.check(ddp)
    for name, mask in ps.named_masks(alone):
        assert torch.equal(mask, ps.mask_of(ddp, name))
        torch.testing.assert_close(ps.stored(alone, name), ps.stored(ddp, name))


class Experts(nn.Module):
    """A stack of two matrices."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x, experts):
        return [x @ self.matrices[expert] for expert in experts]


def grams_of_experts_are_summed(rank):
    """One process has tokens for one expert, or the other process has none at all."""
    for experts in ([0], []), ([0], [1, 0]):
        ddp = DistributedDataParallel(Experts())
        with torch.no_grad(), ps.scores.collect(ddp, "*", grams=True) as found:
            ddp(data(0), experts[rank])
        counts = [sum(expert in own for own in experts) for expert in range(2)]
        assert found.count("matrices") == 4 * sum(counts)
        x = data(0).double()
        for count, gram in zip(counts, found.gram("matrices"), strict=True):
            torch.testing.assert_close(gram, count * (x.T @ x))


def draws_are_alike_whatever_the_seeds(rank):
    torch.manual_seed(rank)
    ddp = DistributedDataParallel(net())
    torch.manual_seed(10 + rank)
    ps.sparsify(ddp, ps.Prune(0.5, score=ps.scores.random))
    ps.distributed.check(ddp)
    own = torch.rand(3)
    every = [torch.empty(3) for _ in range(2)]
    dist.all_gather(every, own)
    assert not torch.equal(*every)  # each goes on with a stream of its own


def check_names_what_differs(rank):
    model = ps.sparsify(net(), 0.5)
    ps.distributed.check(model)
    if rank == 1:
        mask = ps.mask_of(model, "2.weight")
        mask[0, 0] = ~mask[0, 0]
    with pytest.raises(RuntimeError, match=r'these differ: "2.weight" \(processes \[0\] and \[1\]'):
        ps.distributed.check(model)
    ps.deploy_masks(model, {"2": torch.tensor(1.0)})
    ps.distributed.check(model)
    if rank == 1:
        ps.squash(model, "0.weight")
    with pytest.raises(RuntimeError, match='"0.weight"'):
        ps.distributed.check(model)
    if rank == 0:
        ps.squash(model, "0.weight")
        ps.deploy_masks(model, {"2": None})
    with pytest.raises(RuntimeError, match='"2.weight"'):
        ps.distributed.check(model)


def a_controller_that_does_not_know_of_the_others_warns(rank):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dst = ps.rigl(model, 0.5, optimizer, stop=10, every=1)
    loss(DistributedDataParallel(model), data(rank)).backward()
    with pytest.warns(UserWarning, match="give the controller the wrapper"):
        dst.step()


@pytest.mark.parametrize(
    "job",
    [
        a_controller_that_does_not_know_of_the_others_warns,
        ddp_wrapped_before_sparsify,
        ddp_forward_after_squash,
        dense_gradients_are_averaged,
        gates_train_alike,
        statistics_are_summed,
        grams_are_summed,
        grams_of_experts_are_summed,
        statistics_of_what_one_process_does_not_reach,
        draws_are_alike_whatever_the_seeds,
        check_names_what_differs,
    ],
)
def test_ddp(run, job):
    run(2, job)
