"""The names that dense checkpoints and other libraries have for the tensors of a masked module."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from parasparse import names
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks import protocol


def accept_dense_keys(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *_: object,
) -> None:
    """Rename in `state_dict` what others call the masked tensors of `module` (a load pre-hook).

    `weight` and `weight_orig` become the stored tensor, `weight_mask` and `mask` the mask; see
    `parasparse.names`. What a checkpoint with values does not contain, such as the mask in a dense
    one, stays; but a mask on the meta device, which has no values, is unset where values are
    assigned.
    """
    if not parametrize.is_parametrized(module):
        return
    stacks = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
    used: dict[str, None] = {}
    for name, stack in stacks.items():
        if not isinstance(stack, MaskedParametrizationList):
            continue
        inside = f"{prefix}parametrizations.{name}."
        mask_key = f"{inside}{len(stack) - 1}.mask"
        for key in _mask_keys(f"{prefix}{name}"):
            own = key.removeprefix(prefix)
            if key in state_dict and key == prefix + own and not _owns(module, own):
                state_dict[mask_key] = state_dict[key]
                used[key] = None  # the other component of a pair may read it as well
        for key in (f"{prefix}{name}", f"{prefix}{name}_orig"):
            if key in state_dict:
                value = state_dict.pop(key)
                _store(state_dict, inside, stack, value)
                for own, tensor in stack.state_dict(prefix=inside).items():
                    if own != mask_key:  # an absent mask stays anyhow, and may be shared
                        state_dict.setdefault(own, tensor)
                    elif tensor.is_meta and local_metadata.get("assign_to_params_buffers"):
                        protocol.forget_(stack.mask, value.device)
    for key in used:
        del state_dict[key]


def _mask_keys(name: str) -> list[str]:
    """Return what others may call the mask of `name`, or that of the pair it belongs to."""
    return [key for one in (name, *dict(names.joints(name))) for key in names.mask_keys(one)]


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
