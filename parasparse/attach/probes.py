"""Probes: leaves whose gradient is that of a whole weight, dropped entries included."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parasparse.attach.fsdp_gradients import COLLECTED_TWICE
from parasparse.attach.stack import MaskedParametrizationList


@contextmanager
def probed(stacks: list[MaskedParametrizationList]) -> Iterator[Tensor]:
    """Arm all places of one tensor; yield the probe, a leaf whose gradient is that of the weight.

    Raises:
        RuntimeError: it is armed already.
    """
    if any(stack.probe is not None for stack in stacks):
        raise RuntimeError(COLLECTED_TWICE)
    try:
        yield _probe(stacks)
    finally:
        for stack in stacks:
            # Not set to None: compiled graphs guard on the attribute not being there.
            stack.__dict__.pop("probe", None)


def _probe(stacks: list[MaskedParametrizationList]) -> Tensor:
    """Arm all `stacks` of one tensor with one probe, so that ties add up as in `.grad`."""
    with torch.no_grad():
        like = stacks[0].original if stacks[0].is_tensor else stacks[0].stored()
    probe = torch.zeros_like(like).requires_grad_()
    for stack in stacks:
        stack.probe = probe
    return probe
