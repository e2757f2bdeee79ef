"""Groups of the units of `coupled`: those that are in the same places of the same tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Labels = Mapping[str, list[Tensor]]  # by name of a tensor: the unit of each entry; -1: none


def groups_of(number: int, labels: Labels, shapes: list[Tensor]) -> Tensor:
    """Return the group of each unit.

    Slices of a tensor that must keep equally many, such as the groups of a convolution, are groups
    of their own.

    Args:
        number: of units.
        labels: of the tensors.
        shapes: joint labels that must stay regular.
    """
    key = torch.zeros(number, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for label in (label for each in labels.values() for label in each):
        ids = torch.unique(label)
        key[ids[ids >= 0]] += torch.randint(2**40, (), generator=generator)
    for label in shapes:
        for part in label.flatten(0, -2):
            ids = torch.unique(part)
            ids = ids[ids >= 0]
            if len(ids) > 1:
                key[ids] += torch.randint(2**40, (), generator=generator)
    groups: Tensor = torch.unique(key, return_inverse=True)[1]
    return groups


def layers_of(groups: Tensor, labels: Labels, shapes: Mapping[str, torch.Size]) -> list[str]:
    """Return the name of the layer that computes the units of each group.

    That is the first tensor, in the order in which the model uses them, that has some: a matrix, if
    there is one.
    """
    found: dict[int, str] = {}
    for name in sorted(labels, key=lambda name: len(shapes[name]) < 2):
        for label in labels[name]:
            for group in torch.unique(groups[label[label >= 0]]).tolist():
                found.setdefault(group, name)
    return [found[group] for group in range(len(found))]
