"""Within one call of a module, each of its masked tensors is masked once, however often it is read.

Fused experts read `self.gate_up_proj[i]` for each expert, and a hand-written recurrent layer reads
its weight at each step. Each of these reads would mask the whole tensor again.

What was read is kept until the call returns, on the thread that runs it. It is not used again if
anything that it was computed from has changed, or in surroundings where it might not be valid.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.apply import is_recorded
from parasparse.sharding.dtensors import PLAIN


class _Read:
    """What was read, and what it was computed from."""

    def __init__(self, value: Tensor, sources: list[Tensor]) -> None:
        self.value = value
        self._sources = sources  # their ids must stay theirs
        self._seen = _seen(value, *sources)

    def is_of(self, sources: list[Tensor]) -> bool:
        """Whether it was computed from `sources`, and nothing has changed since."""
        return _seen(self.value, *sources) == self._seen


def _seen(*tensors: Tensor) -> list[tuple[int, int, int, bool]]:
    # `tensor.data = other` changes the memory, but not the version, which inference tensors lack.
    return [
        (
            id(t), t.data_ptr() if type(t) in PLAIN else 0,
            0 if t.is_inference() else t._version, t.requires_grad,
        )
        for t in tensors
    ]  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """A running call of `module`."""

    module: nn.Module
    surroundings: tuple[Any, ...]
    kept: dict[tuple[Any, ...], _Read] = field(default_factory=dict)


class _Innermost(threading.local):
    call: _Call | None = None


_innermost = _Innermost()


def may_read_twice(base: Any) -> bool:
    """Whether a call of class `base` may read a tensor more than once.

    Of torch's own classes, only attention does.
    """
    forward = base.forward
    if not inspect.isfunction(forward):
        return False
    is_torchs = (forward.__module__ or "torch").partition(".")[0] == "torch"
    return not is_torchs or forward is nn.MultiheadAttention.forward


def call_over(base: Any) -> Callable[..., Any]:
    """Return a `__call__` that calls that of `base` and keeps what is read meanwhile.

    Not a `forward`, because torch.fx and others look at its code.
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if torch.compiler.is_compiling():
            return base.__call__(self, *args, **kwargs)
        outer = _innermost.call
        call = _innermost.call = _Call(self, _surroundings())
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            _innermost.call = outer
            call.kept.clear()

    return __call__


def read(module: nn.Module, stack: MaskedParametrizationList) -> Tensor:
    """Return `stack.forward()`, or what it returned earlier in this call of `module`."""
    call = None if torch.compiler.is_compiling() else _innermost.call
    if call is None or call.module is not module or not _may_keep(stack, call):
        return stack.forward()
    sources = stack.sources()
    key = stack, *_modes(stack, sources[0])
    kept = call.kept.get(key)
    if kept is not None and kept.is_of(sources):
        return kept.value
    value = stack.forward()
    call.kept[key] = _Read(value, sources)
    if value.grad_fn is not None:
        # A backward pass inside `forward` frees this graph, and a step of an optimizer may follow.
        value.register_hook(_clearing(call.kept))
    return value


def keep_in_this_mode(module: nn.Module) -> None:
    """Let the running call of `module` keep what it reads, in the mode that a hook entered."""
    call = _innermost.call
    if call is not None and call.module is module:
        _innermost.call = replace(call, surroundings=_surroundings())


def _clearing(kept: dict[Any, _Read]) -> Callable[[Tensor], None]:
    return lambda _: kept.clear()


def _may_keep(stack: MaskedParametrizationList, call: _Call) -> bool:
    return (
        stack.frozen is None
        and stack.stand_in is None
        and len(stack._modules) == 1  # spectral_norm iterates at each read
        and not is_recorded(stack.original)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and call.surroundings == _surroundings()
    )


def _surroundings() -> tuple[Any, ...]:
    """Return what must be as it was when the module was called.

    Checkpointing of a part of `forward` runs this part again later, and has to find the same
    operations then. A mode such as FakeTensorMode makes tensors that must not be used outside.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks, torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()


def _modes(stack: MaskedParametrizationList, stored: Tensor) -> tuple[Any, ...]:
    """Return what must be alike when a value is read again."""
    mask: Any = stack._modules["0"]
    stream = torch.cuda.current_stream(stored.device) if stored.is_cuda else None
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *grad, torch._C._is_any_autocast_enabled(), mask.training, stream
