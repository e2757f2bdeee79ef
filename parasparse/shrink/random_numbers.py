"""Random numbers of a run, which are those of no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KINDS = ("cuda", "xpu")  # whose generators are one for each device


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draw the same random numbers each time, and leave the generators of all devices as they are.

    Not by `torch.manual_seed`, which seeds devices too that are used later.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(0)
        for kind in _KINDS:
            module = getattr(torch, kind)
            if module.is_initialized():
                devices = range(module.device_count())
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
                module.manual_seed_all(0)
        yield
