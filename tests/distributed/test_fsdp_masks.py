"""Masks that FSDP2 shards with their weights."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import parasparse as ps
from tests.distributed.training import (
    Block,
    batch,
    fsdp_with_masks,
    loss,
    masks_of,
    net,
    sgd,
    shards_bool,
    trains_as,
    weights_of,
    whole,
)


def masks_are_sharded_when_asked(rank):
    model = fsdp_with_masks(ps.sparsify(net(), 0.6))
    local = sum(p.to_local().numel() for _, p in model.named_parameters() if p.dtype == torch.bool)
    every = sum(mask.numel() for mask in masks_of(ps.sparsify(net(), 0.6)).values())
    assert abs(local - every / dist.get_world_size()) <= 32  # a row of each
    mask = ps.mask_of(model, "1.wide.weight")
    assert isinstance(mask, DTensor)
    with pytest.raises(RuntimeError, match="before `fully_shard`"):
        ps.distributed.shard_masks(model)
    with pytest.raises(RuntimeError, match="must stay torch.bool"):
        ps.deploy_masks(model, {"1.wide": None})
    with pytest.raises(RuntimeError, match="must stay torch.bool"):
        ps.deploy_masks(model, {"1.wide": torch.full((20, 10), 0.5)})
    new = torch.rand(20, 10) > 0.5
    dist.broadcast(new, 0)
    ps.deploy_masks(model, {"1.wide": new})
    assert torch.equal(whole(ps.mask_of(model, "1.wide.weight")), new)
    ps.deploy_masks(model, {"1.wide": ps.mask_of(model, "1.wide.weight")})  # itself
    assert torch.equal(whole(ps.mask_of(model, "1.wide.weight")), new)
    alone = ps.deploy_masks(ps.sparsify(net(), 0.6), {"1.wide": new})
    trains_as(model, alone, rank)


def fsdp2_writes_after_an_evaluation(rank):
    """The outermost layer stays gathered after a forward without a backward."""
    model, alone = (ps.sparsify(net(), 0.2) for _ in range(2))
    fsdp_with_masks(model)
    for verb in (
        lambda each: ps.sparsify(each, 0.7),
        lambda each: ps.deploy_masks(each, {"0": torch.eye(10, 8)}),
        ps.squash,
    ):
        with torch.no_grad():
            loss(model, 0, rank, dist.get_world_size())
        assert not isinstance(next(model.parameters()), DTensor)
        verb(model)
        verb(alone)
        expected = weights_of(alone)
        for name, value in weights_of(model).items():
            torch.testing.assert_close(value, expected[name])


def ties_and_pairs_stay_together(rank):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6, bias=False)
            self.again = nn.Linear(6, 6, bias=False)
            self.again.weight = self.inner.weight
            self.x_re = nn.Parameter(torch.randn(6, 6))
            self.x_im = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return self.again(torch.tanh(self.inner(x))) @ self.x_re @ self.x_im

    def made():
        torch.manual_seed(0)
        return Tied()

    def step(each, optimizer, x):
        optimizer.zero_grad()
        each(x).square().mean().backward()
        optimizer.step()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for masks in (False, True):
        alone, model = (ps.sparsify(made(), {"inner.weight": 0.5, "x": 0.5}) for _ in range(2))
        fully_shard(ps.distributed.shard_masks(model) if masks else model)
        optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (alone, model)]
        for each, optimizer in zip((alone, model), optimizers, strict=True):
            step(each, optimizer, x)
            ps.sparsify(each, {"again.weight": 0.7, "x": 0.7})
            step(each, optimizer, x)
        for name, mask in masks_of(alone).items():
            assert torch.equal(mask, whole(ps.mask_of(model, name)))
        for each, optimizer in zip((alone, model), optimizers, strict=True):
            ps.squash(each)
            step(each, optimizer, x)
        assert model.again.weight is model.inner.weight
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(whole(model.state_dict()[name]), value)


def _keep_weight(seen, module, args, out):
    seen["weight"] = module.weight.detach().clone()


def sharded_masks_under_mixed_precision(rank):
    """Torch 2.9 casts bools too, when it gathers them."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for masks in (False, True):
        model = ps.sparsify(net().float(), 0.5)
        if masks:
            ps.distributed.shard_masks(model)
        fully_shard(model, mp_policy=policy)
        seen = {}
        model[2].register_forward_hook(partial(_keep_weight, seen))
        optimizer = sgd(model)
        pruner = ps.GradualPruning(
            model, 0.8, optimizer, schedule=ps.schedules.Cubic(0.0, 1.0, stop=4), every=2
        )
        for step in range(4):
            optimizer.zero_grad()
            inputs, labels = batch(step, rank, dist.get_world_size())
            nn.functional.cross_entropy(model(inputs.bfloat16()).float(), labels).backward()
            grad, mask = ps.stored(model, "2.weight").grad, ps.mask_of(model, "2.weight")
            assert not whole(grad)[~whole(mask)].any()
            expected = whole(ps.stored(model, "2.weight")).bfloat16().where(whole(mask), 0)
            assert torch.equal(seen["weight"], expected)
            optimizer.step()
            pruner.step()
        assert int(whole(ps.mask_of(model, "2.weight")).sum()) == 14


def checkpointing_and_compile(rank):
    """bf16, activation checkpointing and torch.compile, all at once, against one process."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for masks in (False, True):
        alone, model = (ps.sparsify(net(), 0.5) for _ in range(2))
        if masks:
            ps.distributed.shard_masks(model)
        for index, module in enumerate(model):
            if isinstance(module, Block):
                model[index] = checkpoint_wrapper(module)
                model[index].compile(backend="aot_eager")
                fully_shard(model[index])
        fully_shard(model)
        trains_as(model, alone, rank)
        ps.sparsify(model, 0.8)
        ps.sparsify(alone, 0.8)
        trains_as(model, alone, rank)


SHARDING = [
    masks_are_sharded_when_asked,
    fsdp2_writes_after_an_evaluation,
    ties_and_pairs_stay_together,
    sharded_masks_under_mixed_precision,
    checkpointing_and_compile,
]


@shards_bool
@pytest.mark.parametrize("job", SHARDING)
def test_fsdp_with_sharded_masks(run, job):
    run(2, job)


@pytest.mark.skipif(torch.__version__ >= "2.12", reason="is refused by older torch")
def test_old_torch_is_told_of():
    with pytest.raises(RuntimeError, match="needs torch 2.12 or newer"):
        ps.distributed.shard_masks(ps.sparsify(net(), 0.5))
