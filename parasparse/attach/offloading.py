"""Weights that Hugging Face's accelerate keeps elsewhere until their module runs."""

from typing import Any

from torch import nn

from parasparse.attach.stack import originals_in, stack_of


def check_not_offloaded(module: nn.Module, attr: str, name: str) -> None:
    """Raise RuntimeError if tensor `name` is on the meta device between the calls of `module`.

    The hook that brings its values is on the module, or on its parametrizations.
    """
    stack = stack_of(module, attr)
    tensors: Any = (module._parameters.get(attr),) if stack is None else originals_in(stack)
    is_meta = any(tensor is not None and tensor.is_meta for tensor in tensors)
    if is_meta and any(hasattr(each, "_hf_hook") for each in module.modules()):
        raise RuntimeError(
            f'"{name}" is offloaded: its values are elsewhere until its module runs. Remove the '
            "hooks first, with accelerate.hooks.remove_hook_from_submodules(model)."
        )
