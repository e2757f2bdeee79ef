"""Gram matrices of inputs, x x^T summed over samples; layers with the same inputs share one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from parasparse.dtypes import all_finite
from parasparse.scores.inputs import Rows
from parasparse.scores.layouts import Layout
from parasparse.scores.row_sums import RowSum
from parasparse.scores.stack_grams import StackGram
from parasparse.scores.stack_products import Seen


@dataclass(eq=False)
class SharedGram:
    """The Gram matrix of tensors that have had the same inputs until now.

    The latest input is added once all members have seen it: one that does not see it leaves with
    the sum before it.

    Attributes:
        rows: how the layers of its members read the latest input.
        members: names of tensors.
        sum: of the inputs.
        inputs: how many inputs there were, the latest included.
        source: the latest input, and its version then.
        inference: a copy of the latest input if it is an inference tensor, which has no version.
        seen: members that have seen the latest input.
        waiting: a copy of the latest input until it is added.
    """

    rows: Rows
    members: set[str]
    sum: RowSum = field(default_factory=RowSum)
    inputs: int = 0
    source: tuple[Callable[[], Tensor | None], int | None] | None = None
    inference: Tensor | None = None
    seen: set[str] = field(default_factory=set)
    waiting: Tensor | None = None

    def is_latest(self, x: Tensor, rows: Rows) -> bool:
        """Whether `x`, read in this way, is the latest input, and has not changed since."""
        if self.source is None or rows.geometry != self.rows.geometry:
            return False
        if self.source[0]() is not x or self.source[1] != _version(x):
            return False
        return self.inference is None or torch.equal(self.inference, x)

    def start(self, name: str, x: Tensor, rows: Rows) -> None:
        """Take `x`, read in this way, as the latest input, seen by `name`."""
        self.inputs, self.rows = self.inputs + 1, rows
        self.inference = x.clone() if x.is_inference() else None
        self.source, self.seen, self.waiting = (ref(x), _version(x)), {name}, x.detach()
        if self.members == self.seen:
            self.add()
        else:
            self.waiting = self.waiting.clone()  # someone may change it in place

    def see(self, name: str) -> None:
        """Note that `name` has seen the latest input too."""
        self.seen.add(name)
        if self.members == self.seen:
            self.add()

    def add(self) -> None:
        """Add the latest input to the sum, if that has not been done."""
        if self.waiting is None:
            return
        x, self.waiting = self.waiting, None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for part in self.rows.of(x):
                self.sum.add(part)

    def without(self, names: set[str]) -> SharedGram:
        """Let `names` leave, which have not seen the latest input; return their own Gram."""
        self.members -= names
        return SharedGram(self.rows, names, self.sum.copy(), self.inputs - 1, seen=set(names))

    def copy(self, name: str) -> SharedGram:
        """Return a copy for `name` alone."""
        return SharedGram(self.rows, {name}, self.sum.copy(), self.inputs)


class Grams:
    """The Gram matrices of tensors, by name.

    Attributes:
        rows: how the layer of each watched tensor reads its inputs.
        shared: the Gram of each tensor that had an input.
        stacks: the Gram matrices of each stack of matrices that had one.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = {}
        self.shared: dict[str, SharedGram] = {}
        self.stacks: dict[str, StackGram] = {}

    def layout(self, name: str) -> Layout | None:
        """Return the layout of tensor `name`; None if there is no Gram matrix of it."""
        known = self.stacks.get(name) or self.rows.get(name)
        return None if known is None else known.layout

    def samples(self, name: str) -> int:
        """Return how many inputs tensor `name` had."""
        if name in self.stacks:
            return self.stacks[name].samples
        return self.shared[name].sum.samples if name in self.shared else 0

    def total(self, name: str) -> Tensor:
        """Return the Gram matrices of tensor `name`, which had inputs: (groups, in, in)."""
        found = self.stacks.get(name) or self.shared[name].sum
        found.finish()
        assert found.total is not None
        return found.total

    def add(self, name: str, x: Tensor, rows: Rows) -> None:
        """Add the input `x` of tensor `name`.

        Raises:
            RuntimeError: `x` is not finite.
        """
        gram = self.shared.get(name)
        if gram is None:
            self._first(name, x, rows)
        elif gram.is_latest(x, rows) and name not in gram.seen:
            gram.see(name)
        else:
            if name in gram.seen:
                self._split(gram, gram.members - gram.seen)
                gram.add()
            else:
                self._split(gram, {name})
                gram = self.shared[name]
            self._start(gram, name, x, rows)

    def _first(self, name: str, x: Tensor, rows: Rows) -> None:
        for gram in self.shared.values():
            if gram.inputs == 1 and gram.is_latest(x, rows):
                gram.members.add(name)
                gram.see(name)
                self.shared[name] = gram
                return
        gram = SharedGram(rows, {name})
        self._start(gram, name, x, rows)
        self.shared[name] = gram

    def add_products(self, seen: Seen) -> None:
        """Add rows that met matrices of a stack.

        Raises:
            RuntimeError: they are not finite, or earlier ones met the transposed matrices.
        """
        name = seen.name
        for rows in seen.rows.values():
            _check_finite(rows, f'an input of "{name}"')
            if name not in self.stacks:
                self.stacks[name] = StackGram(seen.layout, rows.shape[-1], rows.device)
        gram = self.stacks[name]
        if gram.layout != seen.layout:
            raise RuntimeError(
                f'the matrices of "{name}" must be multiplied from one side; they are from both. '
                "Exclude the tensor."
            )
        gram.add(seen.rows)

    def _start(self, gram: SharedGram, name: str, x: Tensor, rows: Rows) -> None:
        _check_finite(x, f'input {gram.inputs + 1} of "{name}"')
        gram.start(name, x, rows)

    def _split(self, gram: SharedGram, names: set[str]) -> None:
        if names:
            own = gram.without(names)
            self.shared.update(dict.fromkeys(names, own))
            if gram.members == gram.seen:
                gram.add()

    def settle(self) -> None:
        """Add what waits, at the end of the block."""
        for gram in set(self.shared.values()):
            self._split(gram, gram.members - gram.seen)
        for gram in set(self.shared.values()):
            gram.add()
            gram.sum.finish()
            gram.source = gram.inference = None
        for stack in self.stacks.values():
            stack.finish()

    def sum_over(self, group: Any, summed: Callable[[Tensor | None], Tensor | None]) -> None:
        """Sum over the processes of `group`; `summed` does so for one tensor, which may be None."""
        partitions: list[Any] = [None] * torch.distributed.get_world_size(group)
        own = sorted({tuple(sorted(gram.members)) for gram in self.shared.values()})
        torch.distributed.all_gather_object(partitions, own, group=group)
        if any(partition != own for partition in partitions):
            self.shared = {name: gram.copy(name) for name, gram in self.shared.items()}
        done: set[SharedGram] = set()
        for name, rows in self.rows.items():
            gram = self.shared.get(name) or SharedGram(rows, {name})
            if gram not in done:
                gram.sum.total = summed(gram.sum.total)
                samples = summed(torch.tensor(gram.sum.samples))
                gram.sum.samples = 0 if samples is None else int(samples)
                if gram.sum.total is not None:
                    self.shared[name] = gram
                done.add(gram)
        self._sum_stacks_over(group, summed)

    def _sum_stacks_over(
        self, group: Any, summed: Callable[[Tensor | None], Tensor | None]
    ) -> None:
        own = {name: (one.layout, one.inputs) for name, one in self.stacks.items()}
        every: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(every, own, group=group)
        known = {name: found for each in every for name, found in each.items()}
        for name, (layout, inputs) in sorted(known.items()):
            if name not in self.stacks:
                self.stacks[name] = StackGram(layout, inputs, torch.device("cpu"))
            stack = self.stacks[name]
            total, samples = summed(stack.total), summed(torch.tensor(stack.samples))
            assert total is not None
            assert samples is not None
            stack.total, stack.samples = total, int(samples)


def _check_finite(x: Tensor, what: str) -> None:
    if not all_finite(x):
        raise RuntimeError(
            f"inputs must be finite; {what} in this block has NaN or infinity. Leave that batch "
            "out, or run the model in float32 or bfloat16."
        )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
