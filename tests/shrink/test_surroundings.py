"""What surrounds a call changes nothing: default device and dtype, autocast, other threads."""

import copy
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.shrink.random_numbers import same_random_numbers
from tests.shrink.test_shrink import assert_same, built, filters


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "meta": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "no default device": lambda: default_device(None),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def network():
    """The constants of what is dropped are added to the biases of the layers that read it."""
    layers = [nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_filters_go_and_their_constants_are_folded(around):
    model, x = network(), torch.randn(5, 4)
    with around():
        ps.sparsify(model, {"0": filters(0.5), "2": filters(0.5)})
        masked = copy.deepcopy(model)
        plan = ps.plan_shrink(model, x)
        ps.shrink(model, x)
    assert (model[0].out_features, model[2].out_features) == (8, 4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not plan.kept_back
    torch.testing.assert_close(model(x), masked(x))


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_units_go_and_come_back(around):
    model, x, others = built("attention")
    with around():
        units = ps.coupled(model, x)
        ps.sparsify(model, units.rules(0.5))
        masked = copy.deepcopy(model)
        plan = ps.plan_shrink(model, x)
        fresh = ps.shrink(copy.deepcopy(masked), plan)
        ps.shrink(model, x)
        full = ps.unshrink(copy.deepcopy(model), plan)
    assert model.heads == 2
    for other in (model, fresh, full):
        assert_same(other, masked, x, others)


def settings():
    """The kernels that torch may use."""
    sdp = torch.backends.cuda
    return (
        torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled,
        sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(),
    )  # fmt: skip


class Slow(nn.Linear):
    """Takes a while, and counts how many run at once."""

    running, most = 0, 0

    def forward(self, x):
        Slow.running += 1
        Slow.most = max(Slow.most, Slow.running)
        time.sleep(0.01)
        Slow.running -= 1
        return super().forward(x)


def test_threads_shrink_models_of_their_own():
    x = torch.randn(3, 4)
    masked = [ps.sparsify(nn.Sequential(network(), Slow(3, 2)), {"0.0": 0.5, "0.2": filters(0.5)})
              for _ in range(4)]  # fmt: skip
    small = [copy.deepcopy(model) for model in masked]
    before, state = settings(), torch.get_rng_state()
    threads = [threading.Thread(target=ps.shrink, args=(model, x)) for model in small]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Slow.most == 1
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(small, masked, strict=True):
        assert one[0][2].out_features == 4
        torch.testing.assert_close(one(x), other(x))


def test_the_generators_of_all_devices_that_are_in_use_are_left_as_they_are(monkeypatch):
    states, seeds = {0: torch.tensor([5]), 1: torch.tensor([6])}, []
    for name, value in {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "get_rng_state": lambda device: states[device],
        "set_rng_state": lambda state, device: states.update({device: state}),
        "manual_seed_all": lambda seed: [seeds.append(seed), states.update({0: 0, 1: 0})],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    before = dict(states)
    with same_random_numbers():
        assert states == {0: 0, 1: 0}
        first = torch.rand(3)
    assert (states, seeds) == (before, [0])
    with same_random_numbers():
        assert torch.equal(torch.rand(3), first)
