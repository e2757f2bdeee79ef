"""Takes batches through a model, block by block: all of them wait until a block is done."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from parasparse.acceleration.measure import called
from parasparse.oneshot.paused_run import Call, Run
from parasparse.oneshot.thread_state import ThreadState


class Walk:
    """The runs of a model on batches.

    A run stops where it calls a block, until `leave` says that the block is done. Inside `entered`
    only.

    Attributes:
        calls: how often the first batch calls each block, in the order of the first calls.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        batches: Sequence[Any],
        *,
        device: torch.device | str | None,
        storage: torch.device | str,
    ) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.device, self.storage = device, storage
        self.calls: Counter[str] = Counter()
        self._owned = {id(m): m for m in (*model.modules(), *model.parameters(), *model.buffers())}
        self._done: set[str] = set()
        self._runs: list[Run] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Stop runs at the blocks; give the runs up at the end."""
        with ExitStack() as stack:
            for name, block in self.blocks.items():
                hook = partial(self._called, name)
                # First, so that a block that waits is not moved to the device.
                handle = block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            stack.callback(self._close)
            # Autocast would keep casts of weights, which change meanwhile.
            stack.enter_context(ThreadState.here().entered())
            yield

    def count(self) -> None:
        """Run the first batch, and count the calls of each block."""
        self._run(0)

    def start(self) -> None:
        """Run all batches from the start up to their next block."""
        self._close()
        # Runs share what is neither parameter nor buffer, such as a table made in the first call.
        kept = [value for m in self.model.modules() for value in tree_leaves(vars(m))]
        self._owned |= {id(value): value for value in kept if isinstance(value, Tensor)}
        for number in range(len(self.batches)):
            self._runs.append(Run(partial(self._run, number), self._done))
            self._advance(self._runs[-1])

    def at(self, name: str) -> list[Call]:
        """Return the calls of the block `name` that runs wait at, in the order of the batches."""
        calls = [run.call for run in self._runs if run.call is not None]
        return [call for call in calls if call.name == name]

    def run_all(self) -> None:
        """Run all batches to the end, without stops."""
        for number in range(len(self.batches)):
            self._run(number)

    def leave(self, name: str) -> None:
        """Go on from the block `name`, up to the next ones.

        If it is called again, the model runs again from the start.
        """
        self._done.add(name)
        if self.calls[name] > 1:
            self.start()
            return
        for run in self._runs:
            if run.call is not None and run.call.name == name:
                self._advance(run)

    def _close(self) -> None:
        for run in self._runs:
            run.close()
        self._runs = []

    def _advance(self, run: Run) -> None:
        if run.call is not None:
            run.call.bring_back()
        run.advance()
        if run.call is not None:
            run.call.put_away(self.storage)
        _trim()

    def _run(self, number: int) -> None:
        batch = self.batches[number]
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        try:
            called(self.model, tree_map(self._on_device, batch))
        except Exception as error:
            error.add_note(f"while the model ran on batch {number}")
            raise

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()  # the caller's tensor stays where it is, whatever moves
        return value if self.device is None else value.to(self.device)

    def _called(self, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        run = threading.current_thread()
        if isinstance(run, Run):
            if name in run.free:
                return
            if name in self._done or name not in self.calls:
                raise ValueError(
                    f'the first batch must call "{name}" as often as all others do, and the blocks '
                    "in the same order. Put another batch first, or give blocks that contain these."
                )
            run.stop(Call(name, block, args, kwargs, self._owned))
        elif not self._runs:  # the first batch, which counts
            self.calls[name] += 1


def _trim() -> None:
    """Return freed memory to the system: glibc keeps it for each thread, and many threads wait."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def batches_in(batches: Iterable[Any]) -> list[Any]:
    """Return `batches` as a list; raise TypeError or ValueError if it is one batch, or none."""
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(
            "`batches` must be an iterable of inputs of the model; got a single "
            f"{type(batches).__name__}. Put it into a list, or split it, as `ids.split(8)` does."
        )
    found = list(batches)
    if not found:
        raise ValueError("`batches` must contain at least one batch; got none.")
    return found
