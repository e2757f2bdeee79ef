"""Torch-Pruning cuts the same channels, where it is right: the networks are equal."""

import copy

import pytest
import torch
import torch_pruning
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.squeezenet import Fire

import parasparse as ps


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def residual():
    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 12, 2, down), BasicBlock(12, 12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def concatenating():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Fire(8, 4, 6, 8), Fire(14, 6, 8, 4), nn.Conv2d(12, 3, 1)
    )


NETWORKS = {"plain": plain, "residual": residual, "concatenating": concatenating}


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_and_outputs_are_those_of_torch_pruning(name):
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    model = NETWORKS[name]().double().eval()
    theirs = copy.deepcopy(model)
    with torch.no_grad():  # so that each entry of what they return tells where it was
        for p in theirs.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    last = [m for m in theirs.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    torch_pruning.pruner.MagnitudePruner(
        theirs, x, importance=torch_pruning.importance.RandomImportance(), pruning_ratio=0.5,
        ignored_layers=[last],
    ).step()  # fmt: skip
    masks = {}
    for key, p in model.named_parameters():
        part = theirs.get_parameter(key).detach()
        there = part.round().long()
        part.copy_(p.detach().flatten()[there])
        mask = torch.zeros(p.numel(), dtype=torch.bool)
        mask[there.flatten()] = True
        if not bool(mask.all()):
            masks[key] = mask.view(p.shape)
    masked = ps.sparsify(copy.deepcopy(model), masks)
    ours = ps.shrink(copy.deepcopy(masked), x)
    shapes = {key: p.shape for key, p in theirs.named_parameters()}
    assert {key: p.shape for key, p in ours.named_parameters()} == shapes
    for network in (masked, theirs):
        torch.testing.assert_close(ours(x), network(x), rtol=1e-9, atol=1e-11)
