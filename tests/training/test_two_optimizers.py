"""One controller over several optimizers does what it does over one that holds all parameters."""

import copy

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.schedules import Linear


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def gradual(model, optimizer):
    return ps.GradualPruning(model, 0.8, optimizer, schedule=Linear(0.0, 1.0, stop=4), every=2)


def evolutionary(model, optimizer):
    return ps.sparse_evolutionary_training(model, 0.8, optimizer, every=2)


def rigl(model, optimizer):
    return ps.rigl(model, 0.8, optimizer, stop=8, every=2)


def momentum(model, optimizer):
    return ps.sparse_momentum(model, 0.8, optimizer, stop=8, every=2)


def lottery(model, optimizer):
    return ps.LotteryTicket(model, 0.8, optimizer, rounds=2, rewind_step=1)


CONTROLLERS = [gradual, evolutionary, rigl, momentum, lottery]


def adam(model):
    return [torch.optim.Adam(model.parameters(), 1e-2)]


def two_adams(model):
    return [torch.optim.Adam(part.parameters(), 1e-2) for part in (model[:2], model[2:])]


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices[:2]), torch.optim.AdamW([*matrices[2:], *others])]


def train(model, optimizers, controller, steps=6):
    torch.manual_seed(2)
    for _ in range(steps):
        model(torch.randn(8, 12)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        controller.step()
    if controller.__class__ is ps.LotteryTicket:
        controller.prune()


@pytest.mark.parametrize("make", CONTROLLERS)
def test_two_optimizers_are_as_one(make):
    models = build(), build()
    controllers = []
    for model, optimizers in zip(models, (adam, two_adams), strict=True):
        held = optimizers(model)
        torch.manual_seed(1)  # first masks are drawn
        controllers.append(make(model, held[0] if optimizers is adam else held))
        train(model, held, controllers[-1])
    assert controllers[0].history == controllers[1].history != []
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("make", CONTROLLERS)
def test_muon_beside_adamw(make):
    model = build()
    optimizers = muon_and_adamw(model)
    controller = make(model, optimizers)
    train(model, optimizers, controller)
    assert controller.history
    for name, mask in ps.named_masks(model):
        stored = ps.stored(model, name)
        states = [each.state[stored] for each in optimizers if stored in each.state]
        if make in (gradual, evolutionary):  # others keep what they grow by, or rewind
            alike = [v for s in states for v in s.values() if getattr(v, "shape", 0) == mask.shape]
            assert alike
            assert not any(value[~mask].any() for value in alike)


@pytest.mark.parametrize("make", CONTROLLERS)
def test_it_goes_on_where_it_was_left(make):
    def start():
        model = build()
        optimizers = two_adams(model)
        torch.manual_seed(1)
        return model, optimizers, make(model, tuple(optimizers))

    model, optimizers, controller = start()
    train(model, optimizers, controller, steps=3)
    again, others, resumed = start()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(controller.state_dict()))
    train(model, optimizers, controller, steps=3)
    train(again, others, resumed, steps=3)
    assert resumed.history == controller.history
    one, two = model.state_dict(), again.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("make", CONTROLLERS)
def test_what_no_optimizer_holds_is_refused(make):
    model = build()
    with pytest.raises(ValueError, match=r'must hold the parameters .*"4.weight" are not among'):
        make(model, [torch.optim.Adam(model[0].parameters()), *two_adams(model[:4])])
    assert not ps.is_sparse(model)


@pytest.mark.parametrize("make", CONTROLLERS)
@pytest.mark.parametrize("wrong", ["adam", [nn.Linear(2, 2)]], ids=["text", "module"])
def test_what_is_no_optimizer_is_refused(make, wrong):
    model = build()
    with pytest.raises(TypeError, match="must be a torch optimizer; got .* passed as a list"):
        make(model, wrong)
    assert not ps.is_sparse(model)


def test_a_lottery_of_other_optimizers_is_refused():
    one, two = build(), build()
    saved = lottery(one, adam(one))
    train(one, [], saved, steps=1)
    with pytest.raises(ValueError, match=r"\(it has 2\).*with 1 optimizers"):
        lottery(two, two_adams(two)).load_state_dict(saved.state_dict())
