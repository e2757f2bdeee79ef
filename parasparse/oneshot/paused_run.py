"""A run of a model that stops where it calls a block.

A block can only be pruned when all batches have reached it. Each batch therefore runs in a thread
of its own, which waits in a forward pre-hook of the block. The frames of the model hold what the
rest of it needs: the arguments of the block, and whatever else is passed on, as skip connections
are. Only one thread runs at a time.
"""

import contextvars
import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parasparse.oneshot.placement import move
from parasparse.oneshot.thread_state import ThreadState


@dataclass
class Call:
    """A call of a block that a run has stopped at.

    Attributes:
        name: the name of the block.
        block: the block.
        args, kwargs: what it is called with.
        owned: the modules and tensors of the model by id, which are neither copied nor moved.
        state: what the thread of the run has, such as an autocast of the model.
    """

    name: str
    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    owned: dict[int, Any]
    state: ThreadState = field(default_factory=ThreadState.here)
    _homes: list[tuple[Tensor, torch.device]] = field(default_factory=list)
    _storage: torch.device | str = "cpu"

    def repeated(self) -> Any:
        """Call the block with a copy of its arguments, which it may write into."""
        memo = dict(self.owned)
        for leaf in tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:  # of a model that takes gradients
                memo.setdefault(id(leaf), leaf.detach().clone())
        args, kwargs = copy.deepcopy((self.args, self.kwargs), memo)
        with self.state.entered():
            return self.block(*args, **kwargs)

    @contextmanager
    def brought(self) -> Iterator[None]:
        """Have the arguments where the block runs."""
        self.bring_back()
        yield
        self.put_away(self._storage)

    def put_away(self, storage: torch.device | str) -> None:
        """Move the tensors in the arguments to `storage`, in place."""
        self._storage = storage
        leaves = tree_leaves((self.args, self.kwargs))
        tensors = {id(t): t for t in leaves if isinstance(t, Tensor) and id(t) not in self.owned}
        self._homes = [(tensor, tensor.device) for tensor in tensors.values()]
        move(tensors.values(), storage)

    def bring_back(self) -> None:
        """Move the tensors back to where they were."""
        for tensor, device in self._homes:
            move([tensor], device)


class Run(threading.Thread):
    """A call in a thread of its own, which runs only during `advance`.

    Attributes:
        call: the call of a block at which it has stopped; None once it has returned.
        free: names of blocks at which it need not stop.
    """

    def __init__(self, function: Callable[[], object], free: Iterable[str] = ()) -> None:
        super().__init__(daemon=True)
        self.call: Call | None = None
        self.free = frozenset(free)
        self._context, self._state = contextvars.copy_context(), ThreadState.here()
        self._function = function
        self._error: BaseException | None = None
        self._is_closed = False
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    def advance(self) -> None:
        """Run until the next stop or to the end; raise what the model raises."""
        self.call = None
        if self.ident is None:
            self.start()
        else:
            self._may_run.release()
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, call: Call) -> None:
        """Wait, in this thread, for the next `advance`."""
        if self._is_closed:  # the model has caught what should unwind it
            raise _Closed
        self.call = call
        self._has_stopped.release()
        self._may_run.acquire()
        if self._is_closed:
            raise _Closed

    def close(self) -> None:
        """End the thread where it has stopped."""
        if self.is_alive():
            self._is_closed = True
            self._may_run.release()
            self.join()

    def run(self) -> None:
        """Call the function as in the thread that made this object."""
        try:
            self._context.run(self._called)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._has_stopped.release()

    def _called(self) -> None:
        with torch.no_grad(), self._state.entered():
            self._function()


class _Closed(BaseException):
    """Unwinds the frames of a run that is given up, as GeneratorExit does."""
