"""Threads of `prune_blocks`: they see what the caller sees, and end whatever the model does."""

import copy
import threading

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.oneshot import paused_run
from parasparse.oneshot.paused_run import Run
from parasparse.oneshot.walk import Walk
from tests.oneshot.block_models import Wanda, assert_same, batches, masks_of


class Layers(nn.Module):
    """Calls its layers in the order of a function of the batch."""

    def __init__(self, order=lambda x: [0, 1, 2]):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.order = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), order

    def forward(self, x):
        for number in self.order(x):
            x = self.layers[number](x).relu()
        return x


class OwnAutocast(Layers):
    """Runs its layers in bfloat16, whatever the caller runs in."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x.bfloat16())


class NoAutocast(Layers):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


AUTOCASTS = {
    "of the model": (OwnAutocast, False, torch.bfloat16),
    "of the caller": (Layers, True, torch.bfloat16),
    "of the caller, which the model ends": (NoAutocast, True, torch.float32),
    "none": (Layers, False, torch.float32),
}


@pytest.mark.parametrize("kind", AUTOCASTS)
def test_all_runs_of_a_block_are_in_the_same_precision(kind):
    make, enabled, dtype = AUTOCASTS[kind]
    model, kinds = make(), []
    model.layers[1].register_forward_hook(lambda *call: kinds.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled):
        ps.prune_blocks(model, batches(), ps.OneShot(0.5))
    assert set(kinds) == {dtype}


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_training_sees_the_latest_weights_in_every_mode(mode):
    dense, told = Layers(), []
    model = ps.prune_blocks(copy.deepcopy(dense), batches(), ps.Prune(0.5))
    with MODES[mode]():
        inputs = [x.clone() for x in batches()]
        ps.reconstruct(model, dense, inputs, steps=30, progress=lambda *each: told.append(each))
    assert all(after < before for _, before, after in told)


def test_the_default_device_is_that_of_the_caller():
    seen = []
    with torch.device("meta"):
        Run(lambda: seen.append(torch.empty(1).device.type)).advance()
    assert seen == ["meta"]


class Forces(Layers):
    """Returns a gradient with respect to its input, as potentials of molecules do."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x.sin())
            return torch.autograd.grad(energy.sum(), x)[0]


def test_a_model_may_take_gradients():
    model, other = Forces(), Layers()
    ps.prune_blocks(model, batches(), ps.OneShot(0.5))
    assert_same(model, ps.prune_blocks(other, [x.sin() for x in batches()], ps.OneShot(0.5)))


# The first batch has two rows, the others have three.
ORDERS = {
    "another order": lambda x: [0, 1, 2] if len(x) == 2 else [1, 0, 2],
    "one more": lambda x: [0, 2] if len(x) == 2 else [0, 1, 2],
    "one again": lambda x: [0, 1, 2] if len(x) == 2 else [0, 1, 1, 2],
}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_batch_that_calls_blocks_otherwise_than_the_first_is_an_error(kind):
    model, threads = Layers(ORDERS[kind]), threading.active_count()
    with pytest.raises(ValueError, match="first batch must call") as raised:
        ps.prune_blocks(model, [torch.randn(2, 6), torch.randn(3, 6)], Wanda(0.5))
    assert "batch 1" in raised.value.__notes__[0]
    assert threading.active_count() == threads


def test_a_batch_may_call_fewer_blocks():
    model, reports = Layers(lambda x: [0, 1, 2] if len(x) == 2 else [0, 2]), []
    inputs = [torch.randn(2, 6), torch.randn(3, 6)]
    ps.prune_blocks(model, inputs, ps.OneShot(0.5), progress=reports.append)
    assert [report.rows[0].samples for report in reports] == [5, 2, 5]


class Stubborn(Layers):
    def forward(self, x):
        for layer in self.layers:
            try:
                x = layer(x)
            except BaseException:
                continue
        return x


def test_a_model_that_catches_everything_is_given_up_too():
    def interrupt(report):
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        ps.prune_blocks(Stubborn(), batches(), ps.Prune(0.5), progress=interrupt)
    assert threading.active_count() == threads


class Table(Layers):
    """Blocks get a tensor that is neither parameter nor buffer, and one of the batch."""

    def __init__(self):
        super().__init__()
        self.table = torch.ones(6)

    def forward(self, x, scale):
        for layer in self.layers:
            x = layer(x, self.table, scale=scale)
        return x


class Scaled(nn.Linear):
    def forward(self, x, table, *, scale):
        return super().forward(x * table * scale)


def test_only_what_a_run_has_made_is_moved(monkeypatch):
    model, moved = Table(), []
    model.layers = nn.ModuleList(Scaled(6, 6) for _ in range(2))
    inputs = [(x, torch.ones(6)) for x in batches()]
    monkeypatch.setattr(paused_run, "move", lambda tensors, _: moved.extend(tensors))
    walk = Walk(model, dict(model.layers.named_children()), inputs, device=None, storage="cpu")
    with torch.no_grad(), walk.entered():
        walk.count()
        walk.start()
    assert len(moved) == 6
    shared = [model.table, *(tensor for batch in inputs for tensor in batch)]
    assert not any(one is other for one in moved for other in shared)


class Experts(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows, self.used, self.unused = rows, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x) + (0 if self.rows is None else self.unused(x[: self.rows]).sum())


@pytest.mark.parametrize("rows", [None, 0])
def test_experts_without_tokens_keep_their_masks_and_are_reported(rows):
    torch.manual_seed(0)
    model, reports = nn.Sequential(Experts(rows)), []
    weight = model[0].unused.weight
    smallest = weight.abs() < weight.abs().median()
    ps.sparsify(model, {"0.unused.weight": smallest})
    with pytest.warns(UserWarning, match="no inputs of"):
        ps.prune_blocks(model, batches(), ps.OneShot(0.75), blocks="0", progress=reports.append)
    mask = masks_of(model)["0.unused.weight"]
    assert not (mask & ~smallest).any()
    assert int(mask.sum()) == 9
    assert reports[0].by_magnitude == ("0.unused.weight",)


def test_batches_made_in_inference_mode_are_no_others():
    model, other = Layers(), Layers()
    with torch.inference_mode():
        inputs = [x.clone() for x in batches()]
        ps.prune_blocks(model, inputs, Wanda(0.5))
    assert_same(model, ps.prune_blocks(other, inputs, Wanda(0.5)))
    model(batches()[0]).sum().backward()
    assert model.layers[0].parametrizations.weight.original.grad is not None
