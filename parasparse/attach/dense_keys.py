"""The names that dense checkpoints and other libraries have for the tensors of a masked module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from parasparse.attach.stack import MaskedParametrizationList


def accept_dense_keys(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *_: object,
) -> None:
    """Rename in `state_dict` what others call the masked tensors of `module` (a load pre-hook).

    `weight` and `weight_orig` become the stored tensor, `weight_mask` and `mask` the mask. What a
    checkpoint that brings values says nothing of, such as the mask in a dense one, stays; but a
    mask on the meta device, which has no values to stay, is unset where values are assigned.
    """
    if not parametrize.is_parametrized(module):
        return
    stacks = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
    for name, stack in stacks.items():
        if not isinstance(stack, MaskedParametrizationList):
            continue
        inside = f"{prefix}parametrizations.{name}."
        mask_key = f"{inside}{len(stack) - 1}.mask"
        mask_names = [f"{name}_mask"] + (["mask"] if name in ("weight", "real", "imag") else [])
        for key in mask_names:
            if prefix + key in state_dict and not _owns(module, key):
                state_dict[mask_key] = state_dict.pop(prefix + key)
        for key in (f"{prefix}{name}", f"{prefix}{name}_orig"):
            if key in state_dict:
                value = state_dict.pop(key)
                _store(state_dict, inside, stack, value)
                for own, tensor in stack.state_dict(prefix=inside).items():
                    if own != mask_key:  # an absent mask stays anyhow, and may be shared
                        state_dict.setdefault(own, tensor)
                    elif tensor.is_meta and local_metadata.get("assign_to_params_buffers"):
                        stack.mask.forget_(value.device)  # type: ignore[operator]


def _store(
    state_dict: dict[str, Any], inside: str, stack: MaskedParametrizationList, value: Any
) -> None:
    """Put dense `value` under the names of what `stack` holds."""
    with torch.no_grad():
        for module in reversed(stack.below()):
            value = module.right_inverse(value)  # type: ignore[operator]
    if stack.is_tensor:
        state_dict[f"{inside}original"] = value
    else:
        state_dict |= {f"{inside}original{i}": tensor for i, tensor in enumerate(value)}


def _owns(module: nn.Module, name: str) -> bool:
    stacks = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
    held = (module._parameters, module._buffers, module._modules, stacks)
    return any(name in names for names in held)
