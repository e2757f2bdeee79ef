"""Where a data sparsifier keeps its tensors: in torch's own layout of parametrized ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.attach.stack import MaskedParametrizationList, put_stack, stack_of
from parasparse.masks.apply import apply_mask


class DataMask(nn.Module):
    """Multiplies by a mask that somebody else changes: the buffer is the very tensor given."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, data: Tensor) -> Tensor:
        """Return `data` where the mask is not 0, times it, and +0.0 elsewhere."""
        if self.mask.shape != data.shape:  # or it would broadcast
            raise ValueError(
                f"a mask must keep the shape of its data, {tuple(data.shape)}; it has become "
                f"{tuple(self.mask.shape)}."
            )
        return apply_mask(data, self.mask)


class Container(nn.Module):
    """Tensors by name, masked or plain; `container.<name>` reads one if a Module has no such name.

    Not a masked class (`attach/classes.py`): these are made for each set of names, and here names
    come and go.
    """

    def __getattr__(self, name: str) -> Any:
        stack = None if name in self._modules else stack_of(self, name)
        return super().__getattr__(name) if stack is None else stack()

    def is_masked(self, name: str) -> bool:
        """Whether `name` has a mask."""
        return stack_of(self, name) is not None

    def read(self, name: str) -> Tensor:
        """Return the tensor, masked where it has a mask."""
        stack = stack_of(self, name)
        return self.plain(name) if stack is None else stack()

    def plain(self, name: str) -> Tensor:
        """Return the tensor without its mask."""
        stack = stack_of(self, name)
        tensor = self._buffers[name] if stack is None else stack.original
        assert isinstance(tensor, Tensor)
        return tensor

    def put(self, name: str, held: MaskedParametrizationList | Tensor) -> None:
        """Hold a masked or a plain tensor as `name`."""
        self.forget(name)
        if isinstance(held, Tensor):
            self._buffers[name] = held  # not register_buffer: it refuses names of methods
        else:
            put_stack(self, name, held)

    def forget(self, name: str) -> None:
        """Hold nothing as `name` any more."""
        self._buffers.pop(name, None)
        self._stacks().pop(name, None)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the state of a container of torch.ao.pruning holds: masks come elsewhere."""
        held = {}
        for name, stack in self._stacks().items():
            held[f"parametrizations.{name}.original"] = self.plain(name)
            for key, tensor in stack.mask.state_dict().items():
                if key != "mask":
                    held[f"parametrizations.{name}.0.{key}"] = tensor
        held |= {name: self.plain(name) for name in self._buffers}
        return {key: tensor.detach() for key, tensor in held.items()}

    def _stacks(self) -> dict[str, Any]:
        stacks = self._modules.get("parametrizations")
        return {} if stacks is None else stacks._modules


def masked(
    original: Tensor,
    mask: Tensor,
    group: Mapping[str, Any],
    own: Mapping[str, Tensor] | None = None,
) -> MaskedParametrizationList:
    """Return a stack of `original` under `mask`, by the class that `group` names or `DataMask`.

    Args:
        original: the data.
        mask: its mask, live.
        group: its configuration.
        own: what else the module that masks had in its state.
    """
    module = group.get("parametrization", DataMask)(mask)
    if own:
        module.load_state_dict(own, strict=False)
    stack = MaskedParametrizationList(original, module)
    with torch.no_grad():
        stack()  # what cannot be read is refused before anything has changed
    return stack
