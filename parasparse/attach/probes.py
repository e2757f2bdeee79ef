"""Probes: leaves whose gradient is the dense gradient of a weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from parasparse.attach.fsdp_gradients import COLLECTED_TWICE
from parasparse.attach.stack import MaskedParametrizationList


@contextmanager
def probed(stacks: list[MaskedParametrizationList]) -> Iterator[Tensor]:
    """Yield one probe for all `stacks` of a tensor, so that tied uses add up as in `.grad`."""
    if any(stack.probe is not None for stack in stacks):
        raise RuntimeError(COLLECTED_TWICE)
    with torch.no_grad():
        like = stacks[0].original if stacks[0].is_tensor else stacks[0].stored()
    probe = torch.zeros_like(like).requires_grad_()
    try:
        for stack in stacks:
            stack.probe = probe
        yield probe
    finally:
        for stack in stacks:
            # Not set to None, because compiled graphs guard on the absence of the attribute.
            stack.__dict__.pop("probe", None)
