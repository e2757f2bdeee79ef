"""Whether calling a module runs hooks."""

from torch import nn
from torch.nn.modules import module as _torch


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` runs a hook, its own or a global one.

    If not, `module.forward(x)` does the same as `module(x)` and saves about half a microsecond of
    the ten that a read of a small masked weight takes (benchmarks/overhead.py).
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _torch._global_forward_hooks
        or _torch._global_forward_pre_hooks
        or _torch._global_backward_hooks
        or _torch._global_backward_pre_hooks
    )
