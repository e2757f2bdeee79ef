"""FSDP2: sparsified before or after `fully_shard`, masks whole or sharded, every verb."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import parasparse as ps
from tests.distributed.training import (
    fsdp,
    fsdp_with_masks,
    masks_of,
    net,
    sgd,
    shards_bool,
    trains_as,
    whole,
)


def sparsified_before(rank, shard):
    model, alone = ps.sparsify(net(), 0.6), ps.sparsify(net(), 0.6)
    shard(model)
    trains_as(model, alone, rank)
    with torch.no_grad():
        read = model[0].weight
    assert isinstance(read, DTensor)
    torch.testing.assert_close(whole(read), alone[0].weight.detach())
    for name, parameter in alone.named_parameters():
        grad = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(whole(grad), parameter.grad)


def fsdp2_sparsifies_and_squashes_what_is_sharded(rank, shard):
    """Whenever that is: before the first forward, after it, in the middle of training."""
    for forwards in (0, 2):
        model, alone = fsdp(net()), net()
        if forwards:
            trains_as(model, alone, rank, forwards)
        classes = [type(module) for module in model.modules()]
        keys = list(model.state_dict())
        parameters = list(model.parameters())
        for each in (model, alone):
            ps.sparsify(each, {"1": 0.6, "2": ps.Prune(0.5)})
        assert set(map(id, parameters)) == set(map(id, model.parameters()))
        trains_as(model, alone, rank)
        ps.sparsify(model, 0.7)
        ps.sparsify(alone, 0.7)
        trains_as(model, alone, rank)
        ps.squash(model, "1")
        ps.squash(alone, "1")
        trains_as(model, alone, rank)
        ps.unsparsify(model, "0")
        ps.unsparsify(alone, "0")
        ps.squash(model)
        ps.squash(alone)
        trains_as(model, alone, rank)
        assert [type(module) for module in model.modules()] == classes
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model, alone = shard(ps.sparsify(net(), 0.6)), ps.sparsify(net(), 0.6)
    for steps in (0, 2):
        trains_as(model, alone, rank, steps)
        assert ps.is_sparse(model)
        ps.squash(model, "1.wide.weight")
        ps.squash(alone, "1.wide.weight")
        assert type(model[1].wide).__name__ == "Linear"
        trains_as(model, alone, rank)
        ps.squash(model)
        ps.squash(alone)
        assert not ps.is_sparse(model)
        assert list(model.state_dict()) == list(net().state_dict())
        trains_as(model, alone, rank)
        model, alone = shard(ps.sparsify(net(), 0.6)), ps.sparsify(net(), 0.6)


def what_is_told_of_a_sharded_model(rank, shard):
    model, alone = (ps.sparsify(net(), ps.Prune(0.6, scope="global")) for _ in range(2))
    shard(model)
    dense = ps.dense_state_dict(model)
    assert list(dense) == list(ps.dense_state_dict(alone))
    for name, value in ps.dense_state_dict(alone).items():
        assert torch.equal(whole(dense[name]), value)
    for told, expected in zip(ps.summary(model).rows, ps.summary(alone).rows, strict=True):
        assert (told.name, told.kept, told.pattern) == (
            expected.name, expected.kept, expected.pattern
        )  # fmt: skip
    for told, expected in zip(ps.plan(model, 0.9), ps.plan(alone, 0.9), strict=True):
        assert told == expected
    assert list(dict(ps.named_masks(model))) == list(dict(ps.named_masks(alone)))
    ps.distributed.check(model)


def fsdp2_ranks_as_one_process_does(rank):
    patterns, scores = ps.patterns, ps.scores
    alone, model = (ps.sparsify(net(), ps.Fixed(None)) for _ in range(2))
    fsdp(model)
    for rule in (
        0.5,
        ps.Prune(0.75, scope="global"),
        ps.Prune(pattern=patterns.n_of_m(1, 2)),
        ps.Prune(0.5, pattern=patterns.channel(0)),
        ps.Prune(0.5, score=scores.lamp, scope="global"),
        ps.Fixed(torch.tensor(1.0)),
        "zeros",
        lambda tensors: {name: tensor > 0 for name, tensor in tensors.items()},
    ):
        ps.sparsify(model, rule)
        ps.sparsify(alone, rule)
        expected = masks_of(alone)
        for name, mask in masks_of(model).items():
            assert torch.equal(mask, expected[name])


def a_part_that_another_module_manages_is_refused(rank):
    model = fully_shard(ps.sparsify(net(), 0.5))
    for verb in (
        lambda: ps.squash(model[2]),
        lambda: ps.sparsify(model[2], 0.7),
        lambda: ps.rigl(model[2], 0.7, sgd(model), stop=10, every=2),
        lambda: ps.dense_gradients(model[2]).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="manages its Parameters"):
            verb()
    ps.squash(model, "2")
    trains_as(model, ps.squash(ps.sparsify(net(), 0.5), "2"), rank)


def other_layouts_are_told_of_or_taken(rank):
    model = fsdp(ps.sparsify(net(), ps.Gate(ps.gates.straight_through, sparsity=0.5)))
    alone = ps.sparsify(net(), ps.Gate(ps.gates.straight_through, sparsity=0.5))
    assert str(ps.summary(model)) == str(ps.summary(alone))
    trains_as(ps.squash(model), ps.squash(alone), rank)
    model = fsdp(ps.sparsify(net(), 0.5))
    with pytest.raises(RuntimeError, match="must not be sharded"):
        ps.accelerate(model, torch.ones(1, 8, dtype=torch.double))
    with pytest.raises(RuntimeError, match="set_model_state_dict"):
        ps.load_state_dict(model, ps.sparsify(net(), 0.5).state_dict())
    new = torch.arange(80.0, dtype=torch.double).view(10, 8)
    alone = ps.sparsify(net(), 0.5)
    for each in (model, alone):
        each[0].weight = new
    trains_as(model, alone, rank, 1)
    masks = dict(ps.named_masks(model))
    state, _ = ps.binarize_masks(model.state_dict(), masks)
    expected, _ = ps.binarize_masks(alone.state_dict(), masks)
    for name, value in expected.items():
        torch.testing.assert_close(whole(state[name]), value)


def gates_are_sharded(rank):
    alone, model = (ps.sparsify(net(), ps.Gate(init=0.1)) for _ in range(2))
    with pytest.raises(RuntimeError, match="before weights are sharded"):
        ps.sparsify(fsdp(net()), ps.Gate())
    fsdp(model)
    trains_as(model, alone, rank)
    ps.binarize(model)
    ps.binarize(alone)
    trains_as(model, alone, rank)
    for name, mask in masks_of(alone).items():
        assert torch.equal(mask, whole(ps.mask_of(model, name)))


def what_lies_under_a_mask_is_not_squashed(rank):
    model = net()
    nn.utils.parametrizations.weight_norm(model[0])
    fsdp(ps.sparsify(model, 0.5))
    with pytest.raises(RuntimeError, match="squashed before `fully_shard`"):
        ps.squash(model)
    assert ps.is_sparse(model)


BEFORE = [sparsified_before, fsdp2_sparsifies_and_squashes_what_is_sharded,
          what_is_told_of_a_sharded_model]  # fmt: skip
JOBS = [
    fsdp2_ranks_as_one_process_does,
    a_part_that_another_module_manages_is_refused,
    other_layouts_are_told_of_or_taken,
    gates_are_sharded,
]


@pytest.mark.skipif(torch.__version__ < "2.12", reason="its DTensors know no weight_norm")
def test_what_lies_under_a_mask_is_not_squashed(run):
    run(2, what_lies_under_a_mask_is_not_squashed)


@pytest.mark.parametrize("job", JOBS)
def test_fsdp(run, job):
    run(2, job)


@pytest.mark.parametrize("shard", [fsdp, pytest.param(fsdp_with_masks, marks=shards_bool)])
@pytest.mark.parametrize("job", BEFORE)
def test_fsdp_with_masks_whole_or_sharded(run, job, shard):
    run(2, job, shard)
