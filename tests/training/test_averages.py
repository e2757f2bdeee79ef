"""Averages of a model whose masks change: the average must have the masks of the model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import parasparse as ps
from parasparse.schedules import Cubic


class Average(nn.Module):
    """Copies a model and averages what `update` gives it: as averages of other libraries do."""

    def __init__(self, model, update):
        super().__init__()
        self.module, self._update = copy.deepcopy(model), update

    @torch.no_grad()
    def update_parameters(self, model):
        self._update(self.module, model)


def all_of_the_state(average, model):  # timm's ModelEmaV2
    for ours, theirs in zip(
        average.state_dict().values(), model.state_dict().values(), strict=True
    ):
        ours.copy_(0.5 * ours + 0.5 * theirs)


def all_that_floats(average, model):  # timm's ModelEmaV3
    for ours, theirs in zip(
        average.state_dict().values(), model.state_dict().values(), strict=True
    ):
        ours.copy_(0.5 * ours + 0.5 * theirs if ours.is_floating_point() else theirs)


def parameters_alone(average, model):
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.copy_(0.5 * ours + 0.5 * theirs)


AVERAGES = {
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "all that floats": lambda model: Average(model, all_that_floats),
    "all of the state": lambda model: Average(model, all_of_the_state),
    "parameters alone": lambda model: Average(model, parameters_alone),
}
BY_ITSELF = ["torch", "all that floats"]  # these copy bool masks


def trained(kind, *, copies_masks):
    """Return a model, its average, and the average of the stored weights, computed by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = Cubic(0.0, 1.0, stop=6)
    pruner = ps.GradualPruning(model, 0.9, optimizer, schedule=schedule, every=1)
    average = AVERAGES[kind](model)
    names = [name for name, _ in ps.named_masks(model)]
    expected = {name: ps.stored(model, name).detach().clone() for name in names}
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        pruner.step()
        average.update_parameters(model)
        if copies_masks:
            ps.deploy_masks(average.module, dict(ps.named_masks(model)))
        for name in names:
            share = 0.0 if kind == "torch" and step == 0 else 0.5  # its first update copies
            now = ps.stored(model, name).detach()
            expected[name] = share * expected[name] + (1 - share) * now
    return model, average, expected


@pytest.mark.parametrize(
    ("kind", "copies_masks"),
    [*((kind, True) for kind in AVERAGES), *((kind, False) for kind in BY_ITSELF)],
)
def test_the_average_has_the_masks_of_the_model(kind, copies_masks):
    model, average, expected = trained(kind, copies_masks=copies_masks)
    masks = dict(ps.named_masks(average.module))
    for name, mask in ps.named_masks(model):
        assert masks[name].equal(mask), name
        value = ps.stored(average.module, name)
        torch.testing.assert_close(value, expected[name])
    squashed = ps.squash(copy.deepcopy(average.module))
    assert float((squashed[0].weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert masks["0.weight"] is not ps.mask_of(model, "0.weight")


def test_an_average_that_is_older_than_the_masks_is_refused_by_torch():
    model = nn.Linear(8, 4)
    average = AveragedModel(model)
    ps.sparsify(model, 0.5)
    with pytest.raises((RuntimeError, ValueError)):
        average.update_parameters(model)
