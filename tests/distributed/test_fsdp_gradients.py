"""Dense gradients and statistics of models that FSDP2 shards: what one process sees."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import parasparse as ps
from tests.distributed.training import fsdp, loss, masks_of, net, sgd, trained, whole


def statistics_are_of_the_averaged_gradient(rank):
    for rules in (None, 0.5):
        alone, model = (net() if rules is None else ps.sparsify(net(), rules) for _ in range(2))
        fsdp(model)
        with ps.scores.collect(alone) as expected:
            for step in range(2):
                loss(alone, step).backward()
        with ps.scores.collect(model) as found:
            for step in range(2):
                loss(model, step, rank, dist.get_world_size()).backward()
            with pytest.raises(RuntimeError, match="before `fully_shard`"):
                found.add_synaptic_flow(torch.ones(1, 8))
        for name in ("0.weight", "1.narrow.weight"):
            for what in ("gradient", "movement", "input_norm"):
                torch.testing.assert_close(
                    getattr(found, what)(name), getattr(expected, what)(name)
                )
            masked = alone.get_submodule(name.removesuffix(".weight"))
            grad = ps.stored(model, name).grad
            torch.testing.assert_close(whole(grad), ps.stored(alone, name).grad, msg=str(masked))
        for score in (ps.scores.taylor, ps.scores.wanda):
            ps.sparsify(model, ps.Prune(0.6, score=score(found)))
            ps.sparsify(alone, ps.Prune(0.6, score=score(expected)))
            for name, mask in masks_of(model).items():
                assert torch.equal(mask, whole(ps.mask_of(alone, name)))


def dense_gradients_are_sharded(rank):
    alone, model = (ps.sparsify(net(), 0.5) for _ in range(2))
    fsdp(model)
    with ps.dense_gradients(alone) as expected, ps.dense_gradients(model) as found:
        for step in range(2):  # they accumulate
            loss(alone, step).backward()
            loss(model, step, rank, dist.get_world_size()).backward()
    for name, grad in expected.items():
        assert isinstance(found[name], DTensor)
        torch.testing.assert_close(whole(found[name]), grad)
        torch.testing.assert_close(whole(ps.stored(model, name).grad), ps.stored(alone, name).grad)
        assert not ps.stored(alone, name).grad[~ps.mask_of(alone, name)].any()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ps.dense_gradients(model) as found:
        for step in range(2):  # and start anew
            optimizer.zero_grad()
            loss(model, step, rank, dist.get_world_size()).backward()
    for name, grad in expected.items():
        torch.testing.assert_close(whole(found[name]), grad)
    soft = fsdp(ps.sparsify(net(), ps.Fixed(torch.tensor(0.5))))
    with pytest.raises(RuntimeError, match="bool"), ps.dense_gradients(soft):
        pass


def dense_gradients_whatever_is_done_to_grad_between(rank):
    """Written in place, clipped, collected twice, never reduced."""
    world = dist.get_world_size()
    for change in (
        lambda each, o: o.zero_grad(set_to_none=False),
        lambda each, o: nn.utils.clip_grad_norm_(each.parameters(), 1e-3),
    ):
        alone, model = (ps.sparsify(net(), 0.5) for _ in range(2))
        fsdp(model)
        found, optimizers = {}, {each: sgd(each) for each in (alone, model)}
        for each, args in ((alone, ()), (model, (rank, world))):
            loss(each, 0, *args).backward()
            with ps.dense_gradients(each) as grads:
                for step in range(3):
                    change(each, optimizers[each])
                    loss(each, step, *args).backward()
            found[each] = {name: whole(grad) for name, grad in grads.items()}
        for name, grad in found[alone].items():
            torch.testing.assert_close(found[model][name], grad)
    twice = pytest.raises(RuntimeError, match="collected twice")
    with ps.dense_gradients(model), twice, ps.dense_gradients(model):
        pass
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="pending"), ps.dense_gradients(model):
        loss(model, 0, rank, world).backward()
    model.set_requires_gradient_sync(True)


def frozen_layers_are_passed_over(rank):
    alone, model = (ps.sparsify(net(), 0.5) for _ in range(2))
    for each in (alone, model):
        ps.stored(each, "0.weight").requires_grad_(False)
    fsdp(model)
    with ps.scores.collect(model) as found, ps.scores.collect(alone) as expected:
        loss(model, 0, rank, dist.get_world_size()).backward()
        loss(alone, 0).backward()
    torch.testing.assert_close(found.gradient("2.weight"), expected.gradient("2.weight"))
    controller = ps.rigl(model, 0.5, sgd(model), stop=100, every=1)
    loss(model, 0, rank, dist.get_world_size()).backward()
    controller.step()
    ps.distributed.check(model)
    fully_shard(kept := ps.sparsify(net(), 0.5))
    kept.set_reshard_after_backward(False)
    with ps.scores.collect(kept) as found:
        loss(kept, 0, rank, dist.get_world_size()).backward()
    torch.testing.assert_close(found.movement("2.weight"), expected.movement("2.weight"))


def a_redistribution_may_return_a_tensor(rank):
    def total(masking, name, weight, mask):
        return weight.detach().abs().sum()

    for world, args in ((1, ()), (dist.get_world_size(), (rank,))):
        torch.manual_seed(0)
        model = net() if world == 1 else fsdp(net())
        optimizer = sgd(model)
        controller = ps.DynamicSparsity(
            model, 0.7, optimizer, growth="random", every=2,
            redistribution=ps.moves.needs("weights")(total),
        )  # fmt: skip
        trained(model, optimizer, controller, range(6), *(args or (0,)), world)
        if world == 1:
            expected = masks_of(model)
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, expected[name])


JOBS = [
    statistics_are_of_the_averaged_gradient,
    dense_gradients_are_sharded,
    dense_gradients_whatever_is_done_to_grad_between,
    frozen_layers_are_passed_over,
    a_redistribution_may_return_a_tensor,
]


@pytest.mark.parametrize("job", JOBS)
def test_gradients(run, job):
    run(2, job)
