"""The rows that meet each matrix of a stack, such as fused experts, in whatever multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parasparse.attach.call_scope import keep_in_this_mode
from parasparse.scores.layouts import Layout
from parasparse.sharding.dtensors import PLAIN

# Products, and which argument is the left factor; the right one, (in, out), follows.
_PRODUCTS = {
    "aten.mm": 0, "aten.addmm": 1, "aten.bmm": 0, "aten.baddbmm": 1,
    "aten._grouped_mm": 0, "transformers.grouped_mm_fallback": 0,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Seen:
    """Rows that met some matrices of a stack.

    Attributes:
        name: of the stack.
        layout: of the stack, as the product reads it.
        rows: the rows of each matrix, by its place in the stack.
    """

    name: str
    layout: Layout
    rows: dict[int, Tensor]


class Products(TorchDispatchMode):
    """Tells `add` of the rows that meet the matrices of `stacks`, whatever multiplies them."""

    def __init__(self, add: Callable[[Seen], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.add = add
        self.stacks: dict[str, Tensor] = {}
        self.copies: dict[int, Copy] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = _PRODUCTS.get(str(func.overloadpacket))
        if first is not None:
            x, matrix, *others = args[first:]
            ends = kwargs.get("offs", others[0] if others else None) if x.ndim == 2 else None
            for name, stack in self.stacks.items():
                found = _place(matrix, stack, self.copies)
                if found is not None:
                    layout = Layout(len(stack), is_transposed=found[1], is_stack=True)
                    rows = dict(enumerate(_rows(x, matrix, ends), found[0]))
                    self.add(Seen(name, layout, rows))
        else:
            with self:  # in inference mode, `linear` and `matmul` come here whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if str(func.overloadpacket) == "aten._to_copy":
            self._keep(args[0], result)
        return result

    def _keep(self, tensor: Tensor, copy: Tensor) -> None:
        """Remember a copy of what is in a stack, if its entries lie as they do there."""
        pointers = [stack.untyped_storage().data_ptr() for stack in self.stacks.values()]
        if type(tensor) not in PLAIN or tensor.is_meta or tensor.stride() != copy.stride():
            return
        source = tensor.untyped_storage().data_ptr()
        if source in pointers and copy.numel():
            shift = int(tensor.storage_offset()) - int(copy.storage_offset())
            self.copies[copy.untyped_storage().data_ptr()] = Copy(copy, source, shift)


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of matrices in another dtype, as autocast makes them.

    Attributes:
        tensor: the copy, which is kept so that nothing else gets its place in memory.
        source: where the storage of the matrices begins.
        shift: how much later an entry is there.
    """

    tensor: Tensor
    source: int
    shift: int


def _place(matrix: Tensor, stack: Tensor, copies: Mapping[int, Copy]) -> tuple[int, bool] | None:
    """Return where in `stack` a factor (in, out) begins, and whether it is stored as (in, out)."""
    if type(matrix) not in PLAIN or matrix.is_meta:
        return None
    storage, shift = matrix.untyped_storage().data_ptr(), 0
    if storage in copies:
        storage, shift = copies[storage].source, copies[storage].shift
    elif matrix.dtype != stack.dtype:
        return None
    if storage != stack.untyped_storage().data_ptr():
        return None
    if matrix.ndim == 3 and matrix.stride(0) != stack.stride(0):
        return None
    offset = int(matrix.storage_offset()) + shift - int(stack.storage_offset())
    first, rest = divmod(offset, stack.stride(0))
    for is_transposed, whole in ((True, stack), (False, stack.mT)):
        same = matrix.shape[-2:] == whole.shape[-2:]
        if rest == 0 and same and matrix.stride()[-2:] == whole.stride()[-2:]:
            return first, is_transposed
    return None


def _rows(x: Tensor, matrix: Tensor, ends: Tensor | None) -> Iterator[Tensor]:
    """Yield the rows of `x` that each matrix meets."""
    if matrix.ndim == 2:
        yield x
    elif ends is None:
        yield from x
    else:
        start = 0
        for end in ends.tolist():
            yield x[start:end]
            start = end


@dataclass(eq=False)
class Watch:
    """Hooks that watch the products of the stacks of a module while it runs.

    Attributes:
        owner: the module.
        attributes: where it has the stacks, by their names.
        add: what is told.
        is_ignored: whether a call of a module is not to be watched.
    """

    owner: nn.Module
    attributes: dict[str, str]
    add: Callable[[Seen], None]
    is_ignored: Callable[[nn.Module], bool]

    def __post_init__(self) -> None:
        self._open: list[ExitStack] = []

    def begin(self, module: nn.Module, *_: Any) -> None:
        """Watch; a forward pre-hook."""
        if not self.is_ignored(module):
            products = Products(self.add)
            self._open.append(_casting_again())
            self._open[-1].enter_context(products)
            keep_in_this_mode(module)  # so that these are what the module reads, if it is masked
            stacks = {name: getattr(module, attr) for name, attr in self.attributes.items()}
            products.stacks = {n: stack for n, stack in stacks.items() if type(stack) in PLAIN}

    def end(self, module: nn.Module, *_: Any) -> None:
        """Stop; a forward hook that is always called."""
        if module is self.owner and self._open:
            self._open.pop().close()


def _casting_again() -> ExitStack:
    """Return a stack until whose end autocast makes its copies again, where they are seen."""
    stack = ExitStack()
    stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
    torch.set_autocast_cache_enabled(False)
    return stack
