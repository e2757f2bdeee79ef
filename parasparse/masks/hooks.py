"""Whether calling a module does more than its `forward`."""

from torch import nn
from torch.nn.modules import module as _torch


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook is to run when `module` is called: its own, or one on all modules.

    Without, `module.forward(x)` does what `module(x)` does and saves about half a microsecond, of
    ten that reading a small masked weight takes (benchmarks/overhead.py).
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
