"""Keeps everything outside the blocks on a device, and each block while it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.oneshot.on_disk import OnDisk


def move(tensors: Iterable[Tensor], device: torch.device | str) -> None:
    """Move `tensors` to `device`; they stay the same objects."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


@dataclass(eq=False)
class Place:
    """Where the tensors of a block are.

    Attributes:
        block: a module.
        device: where it runs; None: where it is.
        disk: has its tensors while they are not needed; None: they are in memory.
    """

    block: nn.Module
    device: torch.device | str | None
    disk: OnDisk | None = None
    _home: torch.device | None = field(init=False)
    _is_held: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        devices = (tensor.device for tensor in tensors_of_module(self.block))
        self._home = next((device for device in devices if device.type != "meta"), None)

    def come(self, *_: Any) -> None:
        """Move the block to the device; a forward pre-hook."""
        if self.disk is not None:
            self.disk.load(tensors_of_module(self.block))
        if self.device is not None:
            move(tensors_of_module(self.block), self.device)

    def leave(self, *_: Any) -> None:
        """Move the block back, except within `held`; a forward hook."""
        if self._is_held:
            return
        if self.disk is not None:
            self.disk.unload(tensors_of_module(self.block))
        if self.device is not None and self._home is not None:
            move((t for t in tensors_of_module(self.block) if not t.is_meta), self._home)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the block on the device all the time."""
        self.come()
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self.leave()


@contextmanager
def placed(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    device: torch.device | str | None,
    disk: OnDisk | None = None,
) -> Iterator[dict[str, Place]]:
    """Have everything outside the blocks on `device`; yield the places of the blocks by name."""
    places = {name: Place(block, device, disk) for name, block in blocks.items()}
    inside = {id(t) for block in blocks.values() for t in tensors_of_module(block)}
    outside = [t for t in tensors_of_module(model) if id(t) not in inside]
    with ExitStack() as stack:
        if disk is not None:
            stack.callback(disk.unload, outside)
            disk.load(outside)
        if device is not None:
            for tensor in outside:
                stack.callback(move, [tensor], tensor.device)
            move(outside, device)
        if device is not None or disk is not None:
            for place in places.values():
                stack.callback(place.block.register_forward_pre_hook(place.come).remove)
                hook = place.block.register_forward_hook(place.leave, always_call=True)
                stack.callback(hook.remove)
        yield places


def tensors_of_module(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of `module`."""
    return [*module.parameters(), *module.buffers()]
