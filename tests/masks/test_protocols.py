"""Modules that mask, and controllers, of a user's own: what they may leave out or offer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import parasparse as ps
from parasparse.integrations import resuming


class Bare(nn.Module):
    """Masks, and says nothing else."""

    def forward(self, weight):
        return weight * (weight > 0)


class Full(nn.Module):
    """Offers all that a module that masks may offer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = []
        self.is_told_by_its_values = False

    def forward(self, weight):
        return weight * self.mask

    @property
    def mask(self):
        return self.scale.detach()

    def merged(self, value, stored):
        return value / self.scale

    def penalty(self, weight):
        return self.scale * weight.numel()

    def fold_(self, keep=None):
        self.calls.append("fold_")
        self.scale.data.fill_(1.0)


def masked(module):
    return ps.sparsify(nn.Linear(3, 2), lambda tensors: dict.fromkeys(tensors, module))


def test_a_module_that_says_nothing_gets_the_defaults():
    model = masked(Bare())
    assert torch.equal(ps.mask_of(model, "weight"), ps.stored(model, "weight") > 0)
    with pytest.raises(RuntimeError, match="`merged`"):
        model.weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match="must have gates"):
        ps.penalty(model)
    expected = model.weight.clone()
    assert torch.equal(ps.squash(model).weight, expected)


def test_what_a_module_offers_is_used():
    module = Full()
    model = masked(module)
    assert ps.mask_of(model, "weight") == 2.0
    assert ps.penalty(model) == 12.0
    model.weight = torch.ones(2, 3)
    assert (ps.stored(model, "weight") == 0.5).all()
    with pytest.raises(RuntimeError, match="functional_call"):
        torch.func.functional_call(model, {"weight": torch.ones(2, 3)}, torch.ones(1, 3))
    assert (ps.squash(model).weight == 1).all()
    assert module.calls == ["fold_"]


class Buffered(nn.Module):
    """Has its mask in a buffer, and can unset it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(2, 3))

    def forward(self, weight):
        return weight * self.mask

    def forget_(self, device):
        self.mask = torch.zeros(2, 3, device=device)


def test_a_mask_without_values_is_unset_where_weights_are_assigned():
    with torch.device("meta"):
        model = masked(Buffered())
    state = nn.Linear(3, 2).state_dict()
    model.load_state_dict(state, assign=True, strict=False)
    assert not model.weight.any()
    assert torch.equal(ps.stored(model, "weight"), state["weight"])


def test_a_gate_that_is_a_function_returns_a_mask_of_the_logits_shape():
    for function in (torch.sum, lambda logits: None, lambda logits: logits[:1]):
        with pytest.raises(ValueError, match="of the shape of the logits"):
            ps.sparsify(nn.Linear(3, 2), ps.Gate(function))


def test_a_gate_may_be_any_callable():
    @dataclass
    class Scaled:  # not hashable
        by: float

        def __call__(self, logits):
            return torch.exp(logits * self.by)

    model = ps.sparsify(nn.Linear(3, 2), ps.Gate(Scaled(2.0)))
    assert torch.equal(ps.mask_of(model, "weight"), torch.ones(2, 3))
    assert "Scaled" in repr(model)


class Halving:
    """A controller of a user's own: halves the kept entries at each step."""

    def __init__(self, model):
        self.model, self.history = model, []
        ps.sparsify(model, 0.0)
        self.start = {name: mask.clone() for name, mask in ps.named_masks(model)}

    def step(self):
        self.history.append(len(self.history))
        ps.sparsify(self.model, 1 - 0.5 ** len(self.history))

    def state_dict(self):
        return {"history": list(self.history), "start": self.start}

    def load_state_dict(self, state_dict):
        self.history, self.start = list(state_dict["history"]), state_dict["start"]

    def close(self):
        self.model = None


def test_a_controller_of_a_users_own_is_resumed():
    model = nn.Linear(8, 4)
    controller = Halving(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller.step()
    state = resuming.state_of(controller, model, [optimizer])
    assert resuming.is_of(controller, model)
    other = nn.Linear(8, 4)
    ps.load_state_dict(other, model.state_dict())
    resumed = resuming.resumed(other, lambda: Halving(other), [state])
    assert resumed.history == [0]
    assert torch.equal(ps.mask_of(other, "weight"), ps.mask_of(model, "weight"))
    controller.close()
    assert not resuming.is_of(controller, model)
