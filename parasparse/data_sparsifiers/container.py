"""The tensors of a data sparsifier, in the layout of torch's parametrizations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.attach.container import put_stack
from parasparse.attach.stack import MaskedParametrizationList, stack_of
from parasparse.masks.apply import apply_mask
from parasparse.names import inside


class DataMask(nn.Module):
    """Multiplies by the given mask, which is not copied and may change."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, data: Tensor) -> Tensor:
        """Return `data` times the mask, +0.0 where the mask is 0."""
        if self.mask.shape != data.shape:  # it would broadcast
            raise ValueError(
                f"a mask must keep the shape of its data, {tuple(data.shape)}; it now has "
                f"{tuple(self.mask.shape)}."
            )
        return apply_mask(data, self.mask)


class Container(nn.Module):
    """Tensors by name, masked or plain; `container.<name>` reads one if a Module has no such name.

    It does not use masked classes (`attach/classes.py`), because its names change.
    """

    def __getattr__(self, name: str) -> Any:
        stack = None if name in self._modules else stack_of(self, name)
        return super().__getattr__(name) if stack is None else stack()

    def is_masked(self, name: str) -> bool:
        """Whether `name` has a mask."""
        return stack_of(self, name) is not None

    def read(self, name: str) -> Tensor:
        """Return the tensor, masked if it has a mask."""
        stack = stack_of(self, name)
        return self.plain(name) if stack is None else stack()

    def plain(self, name: str) -> Tensor:
        """Return the tensor without its mask."""
        stack = stack_of(self, name)
        tensor = self._buffers[name] if stack is None else stack.original
        assert isinstance(tensor, Tensor)
        return tensor

    def put(self, name: str, held: MaskedParametrizationList | Tensor) -> None:
        """Store a masked or a plain tensor as `name`."""
        self.forget(name)
        if isinstance(held, Tensor):
            self._buffers[name] = held  # register_buffer refuses names of methods
        else:
            put_stack(self, name, held)

    def forget(self, name: str) -> None:
        """Remove `name`."""
        self._buffers.pop(name, None)
        self._stacks().pop(name, None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors as in torch.ao.pruning's container state, which has no masks."""
        held = {}
        for name, stack in self._stacks().items():
            held[f"{inside(name)}original"] = self.plain(name)
            for key, tensor in stack.mask.state_dict().items():
                if key != "mask":
                    held[f"{inside(name)}0.{key}"] = tensor
        held |= {name: self.plain(name) for name in self._buffers}
        return {key: tensor.detach() for key, tensor in held.items()}

    def _stacks(self) -> dict[str, Any]:
        stacks = self._modules.get("parametrizations")
        return {} if stacks is None else stacks._modules


def masked(
    original: Tensor, mask: Tensor, group: Mapping[str, Any], own: Mapping[str, Tensor]
) -> MaskedParametrizationList:
    """Return `original` with `mask`, applied by the "parametrization" of `group` or `DataMask`.

    `own` is the other state of the module that masks.
    """
    module = group.get("parametrization", DataMask)(mask)
    if own:
        module.load_state_dict(own, strict=False)
    stack = MaskedParametrizationList(original, module)
    with torch.no_grad():
        stack()  # raises if it cannot be read, before anything has changed
    return stack
