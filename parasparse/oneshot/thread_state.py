"""What PyTorch keeps for each thread: autocast, the default device, and the current GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ThreadState:
    """The state of a thread, for another thread to have too.

    Attributes:
        autocasts: whether autocast is enabled, and its dtype, by kind of device.
        device: the default device.
        gpu: index of the current GPU; None without one.
    """

    autocasts: dict[str, tuple[bool, torch.dtype]]
    device: torch.device
    gpu: int | None

    @classmethod
    def here(cls) -> ThreadState:
        """Return the state of this thread."""
        autocasts = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        }
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        return cls(autocasts, torch.empty(0).device, gpu)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this state, without the weights that autocast has cast before."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocasts.items():
                if enabled or torch.is_autocast_enabled(kind):
                    autocast = torch.autocast(kind, dtype, enabled, cache_enabled=False)
                    stack.enter_context(autocast)
            if self.device != torch.empty(0).device:
                stack.enter_context(self.device)
            if self.gpu is not None:
                stack.enter_context(torch.cuda.device(self.gpu))
            yield
