"""FSDP2: sparsified before or after `fully_shard`, masks whole or sharded, every verb."""

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
    fsdp,
    fsdp_with_masks,
    masks_of,
    net,
    sgd,
    shards_bool,
    trained,
    weights_of,
    whole,
)


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


def other_layouts_are_told_of_or_taken(rank):
    model = fsdp(ps.sparsify(net(), ps.Gate(ps.gates.straight_through, sparsity=0.5)))
    alone = ps.sparsify(net(), ps.Gate(ps.gates.straight_through, sparsity=0.5))
    assert str(ps.summary(model)) == str(ps.summary(alone))
    trains_as(ps.squash(model), ps.squash(alone), rank)
    model = fsdp(ps.sparsify(net(), 0.5))
    with pytest.raises(RuntimeError, match="hold its weights whole"):
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


def gates_are_sharded(rank):
    alone, model = (ps.sparsify(net(), ps.Gate(init=0.1)) for _ in range(2))
    with pytest.raises(RuntimeError, match="attached before weights are sharded"):
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


BEFORE = [sparsified_before, fsdp2_sparsifies_and_squashes_what_is_sharded,
          what_is_told_of_a_sharded_model]  # fmt: skip
JOBS = [
    fsdp2_ranks_as_one_process_does,
    statistics_are_of_the_averaged_gradient,
    dense_gradients_are_sharded,
    dense_gradients_whatever_is_done_to_grad_between,
    a_part_that_another_module_manages_is_refused,
    frozen_layers_are_passed_over,
    other_layouts_are_told_of_or_taken,
    a_redistribution_may_return_a_tensor,
    gates_are_sharded,
]


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
    with pytest.raises(RuntimeError, match="must have torch 2.12 or newer"):
        ps.distributed.shard_masks(ps.sparsify(net(), 0.5))


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
