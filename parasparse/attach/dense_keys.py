"""Loads dense checkpoints, and masks of other libraries, into a masked module."""

from typing import Any

import torch
from torch import nn

from parasparse import names
from parasparse.attach.compact_keys import to_compact, to_masked
from parasparse.attach.reading import masked_stacks, stacks_of
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks import protocol
from parasparse.sharding.dtensors import PLAIN


def accept_dense_keys_of(module: nn.Module) -> None:
    """Let `module` load dense checkpoints from now on."""
    hooks = module._load_state_dict_pre_hooks
    if not any(_is_ours(hook) for hook in hooks.values()):
        module.register_load_state_dict_pre_hook(accept_dense_keys)


def refuse_dense_keys_of(module: nn.Module) -> None:
    """Undo `accept_dense_keys_of`."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
        del hooks[key]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", None) is accept_dense_keys


def accept_dense_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *rest: Any
) -> None:
    """Rename the keys of other formats in `state_dict` to those of `module` (a load pre-hook).

    `weight` and `weight_orig` become the stored tensor, `weight_mask` and `mask` the mask; see
    `parasparse.names`. Masked and dense weights become compact ones, or the reverse, as `module`
    has them. Tensors that are missing beside a dense value stay, such as the mask. But a mask on
    the meta device, which has no values, is unset when values are assigned.
    """
    used: dict[str, None] = {}
    for name, stack in masked_stacks(module):
        inside = names.inside(f"{prefix}{name}")
        mask_key = f"{inside}{0 if stack.is_compact else len(stack) - 1}.mask"
        for key in _mask_keys(f"{prefix}{name}"):
            own = key.removeprefix(prefix)
            if key in state_dict and key == prefix + own and not _owns(module, own):
                state_dict[mask_key] = state_dict[key]
                used[key] = None  # kept until the other component of a pair has read it
        _change_format(stack, state_dict, f"{prefix}{name}", *rest[3:])
        if f"{inside}original" in state_dict:  # some modules write the plain key as well
            state_dict.pop(f"{prefix}{name}", None)
        for key in (f"{prefix}{name}", f"{prefix}{name}_orig"):
            if key in state_dict:
                value = state_dict.pop(key)
                with torch.no_grad():
                    originals = stack.originals_of(value)
                state_dict |= {inside + own: tensor for own, tensor in originals.items()}
                for own, tensor in stack.state_dict(prefix=inside).items():
                    if own != mask_key:  # a missing mask stays in any case, and may be shared
                        state_dict.setdefault(own, tensor)
                    elif tensor.is_meta and local_metadata.get("assign_to_params_buffers"):
                        protocol.forget_(stack.mask, value.device)
    for key in used:
        del state_dict[key]
    if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict:
        _store_early(module, state_dict, prefix)


def _change_format(
    stack: MaskedParametrizationList, state_dict: dict[str, Any], name: str, error_msgs: list[str]
) -> None:
    """Make a masked or dense weight compact, or a compact one masked, if `stack` is so."""
    inside = names.inside(name)
    try:
        if stack.is_compact:
            to_compact(state_dict, inside, name, stack[0])  # type: ignore[arg-type]
        elif len(stack) == 1:
            to_masked(state_dict, inside, stack.original.shape)
    except (ValueError, TypeError, RuntimeError) as error:
        error_msgs.append(f'While loading "{name}": {error}')


def _store_early(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Store the values now that torch loads after the module itself, which may read its weight.

    Some quantizers do so, and set their scale anew.
    """
    for name, stack in masked_stacks(module):
        inside = names.inside(f"{prefix}{name}")
        for own, tensor in [*stack._parameters.items(), *stack._buffers.items()]:
            value: Any = state_dict.get(inside + own)
            if tensor is None or type(tensor) not in PLAIN or type(value) not in PLAIN:
                continue
            if value.shape == tensor.shape and not (value.is_meta or tensor.is_meta):
                with torch.no_grad():
                    tensor.copy_(value)


def _mask_keys(name: str) -> list[str]:
    """Return the keys that may contain the mask of `name`, or of the pair that it belongs to."""
    return [key for one in (name, *dict(names.joints(name))) for key in names.mask_keys(one)]


def _owns(module: nn.Module, name: str) -> bool:
    held = (module._parameters, module._buffers, module._modules, stacks_of(module))
    return any(name in tensors for tensors in held)
