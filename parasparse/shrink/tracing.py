"""Runs a model once and finds which entries of its tensors belong to one channel."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parasparse.shrink.by_tensor import ByTensor
from parasparse.shrink.calls import Call, check_can_be_followed, tensors_among
from parasparse.shrink.comparisons import Comparison
from parasparse.shrink.expressions import (
    Attribute,
    Computed,
    Expression,
    Requirement,
    Span,
    attributes_in,
    holding,
    spans_in,
    spans_of,
)
from parasparse.shrink.facts import KNOWN, UNKNOWN, ZERO, Facts, everywhere, facts
from parasparse.shrink.labels import Ties, along, compact, varying
from parasparse.shrink.means import Means
from parasparse.shrink.memory import Changes, has_layout_of, written
from parasparse.shrink.products import Product, Read
from parasparse.shrink.stand_ins import StandIns, ValuesNeeded, reads_values

Rule = Callable[["Trace", Call], list[Facts]]
# Operations that leave 0 as it is, whatever the number is.
_SCALES = ("mul", "div", "hardtanh", "leaky_relu", "elu", "celu", "gelu", "pow")


@dataclass
class Leaf:
    """A parameter or buffer: its name, and the label of each of its dimensions."""

    name: str
    tensor: Tensor
    labels: list[Tensor] = field(default_factory=list)


class Trace(TorchDispatchMode):
    """Follows labels and states through every operation of a run.

    Args:
        model: a model without masks, whose parameters have their masked values.
        dropped: by name of a parameter, its states: ZERO where an entry is pruned.
        rule_for: returns the rule of an operation, or None.
        stand_ins: makes results of products that are not computed; None: all are computed.
        changing: names of parameters and buffers that each run changes, so they are not constants.

    Attributes:
        ties: the ids and what ties them.
        leaves: the parameters and buffers that the run has used, by id.
        reads: the products that sum over channels, in order.
        products: the products with weights.
        averaged: ids over which a norm or a mean is taken, with the module that does it.
        means: the means over channels that are followed to where they are used.
        sums: ids that are summed up without a weight, their states, and the module that does it.
        groups: ids of the rows and inputs of grouped convolutions, by group, and the module.
        normed_groups: ids over which a norm is taken in groups, (groups, each), and the module.
        shapes: joint labels that must stay regular.
        least: ids of which some must stay, and how many: of a slice, so that it is not empty.
        required: sizes that the program states.
        compared: comparisons of sizes whose results must stay.
        numbers: sizes from which the program has computed numbers, such as a scale.
        branches: operations on input data that may decide which branch the program takes.
        constants_hold: whether no value of the input went into the program as a Python number.
        uses: how many operations read each parameter, by id.
        changes: which parameters and buffers the run changes.
    """

    supports_higher_order_operators = True  # which are refused with a message of ours

    def __init__(
        self, model: nn.Module, dropped: dict[str, Tensor],
        rule_for: Callable[[Call], Rule | None], stand_ins: StandIns | None = None,
        changing: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]
        self.ties = Ties()
        self.leaves: dict[int, Leaf] = {}
        self.reads: list[Read] = []
        self.products: list[Product] = []
        self.averaged: list[tuple[Tensor, str]] = []
        self.sums: list[tuple[Tensor, Tensor, str]] = []
        self.groups: list[tuple[Tensor, Tensor, str]] = []
        self.normed_groups: list[tuple[Tensor, str]] = []
        self.shapes: list[Tensor] = []
        self.least: list[tuple[Tensor, int]] = []
        self.required: list[Requirement] = []
        self.compared: list[Comparison] = []
        self.numbers: list[Expression] = []
        self.branches: list[str] = []
        self.constants_hold = True
        self.uses: Counter[int] = Counter()
        self.function = ""  # that the program has called
        self.module = ""
        self.stand_ins = stand_ins
        self._rule_for = rule_for
        self._changing, self.changes = changing, Changes(model)
        self._held = dict([*model.named_buffers(), *model.named_parameters()])
        self._names = {id(tensor): name for name, tensor in self._held.items()}
        self.means = Means(self._names)
        self.dropped = dropped
        self._facts: ByTensor[Facts] = ByTensor()
        self._in_memory: dict[int, ByTensor[None]] = defaultdict(ByTensor)

    def facts(self, tensor: Tensor) -> Facts:
        """Return what is known of `tensor`. Only parameters and buffers are constants by nature."""
        found = self._facts.get(tensor)
        return self._first_facts(tensor) if found is None else found

    def has_read(self, tensor: Tensor) -> bool:
        """Whether the run has used `tensor`."""
        return tensor in self._facts

    def labels(self, tensor: Any) -> tuple[Tensor, ...]:
        """Return the labels of `tensor`, none if it is no tensor."""
        return self.facts(tensor).labels if isinstance(tensor, Tensor) else ()

    def state(self, tensor: Tensor) -> Tensor:
        """Return the state of `tensor`."""
        return self.facts(tensor).state

    def set_facts(self, tensor: Tensor, found: Facts) -> None:
        """Remember what is known of `tensor`."""
        assert found.state.shape == tensor.shape, (found.state.shape, tensor.shape)
        assert all(label.shape == tensor.shape for label in found.labels)
        self._facts[tensor] = found
        self._remember_memory(tensor)
        self.shapes += [compact(label) for label in found.labels if len(varying(label)) > 1]

    def require(self, given: Expression, where: Span, operation: str) -> None:
        """Remember a size that the program states."""
        self.required.append(
            Requirement(given, where, f"{operation} in {self.module or 'forward'}")
        )

    def compare(self, given: Computed, outcome: bool) -> None:
        """Remember that a comparison of sizes must have the same result; what is equal stays so."""
        spans = [each for each in given.operands if isinstance(each, Span)]
        if spans and given.operator is (operator.eq if outcome else operator.ne):
            first, second = given.operands
            self.require(second if first is spans[0] else first, spans[0], "a comparison")
        else:
            self.compared.append(Comparison(given, outcome, self.module or "forward"))

    def settle_sizes(
        self, values: Mapping[Attribute, int],
        sized_by: Callable[[Attribute], tuple[str, int] | None],
    ) -> None:  # fmt: skip
        """Say of the attributes in sizes what they are, and keep those that became numbers.

        Args:
            values: the attributes as they are.
            sized_by: returns the tensor, by name, and the dimension whose size an attribute is.
        """
        given = [*self.numbers, *(each.given for each in self.required)]
        given += (each.given for each in self.compared)
        labels = {leaf.name: leaf.labels for leaf in self.leaves.values()}
        follows = spans_of(given, labels, sized_by)
        numbers = [holding(size, follows) for size in self.numbers]
        for each in (part for size in numbers for part in spans_in(size)):
            ids = each.ids()
            if varying(each.label) == (each.dim,):
                self.ties.pin(ids, "a number is computed from how many there are")
            else:  # whole slices may go, such as heads: they leave the number as it is
                self.ties.tie(ids.narrow(each.dim, 0, 1), ids)
                self.require(ids.shape[each.dim], each, "the computation of a number")
        stay = {a: values[a] for size in numbers for a in attributes_in(size) if a in values}
        held = {**follows, **stay}
        self.required = [replace(each, given=holding(each.given, held)) for each in self.required]
        self.compared = [replace(each, given=holding(each.given, held)) for each in self.compared]

    def write(self, tensors: list[Tensor]) -> None:
        """Forget the states of all tensors in the memory of `tensors`: something writes into it."""
        for memory in {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided}:
            self.changes.written.add(memory)
            for tensor, _ in self._in_memory[memory].items():
                unknown = everywhere(UNKNOWN, tensor.shape)
                self._facts[tensor] = Facts(self._facts[tensor].labels, unknown)

    def average(self, label: Tensor) -> None:
        """Remember that a norm is taken over `label`."""
        self.averaged.append((label, self.module))

    def leaf(self, tensor: Any) -> Leaf | None:
        """Return the parameter or buffer that `tensor` is, or None."""
        if isinstance(tensor, Tensor) and id(tensor) in self._names:
            self.facts(tensor)
            return self.leaves[id(tensor)]
        return None

    def is_stored(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter or buffer, or a part of one."""
        memory = tensor.untyped_storage()._cdata
        return any(leaf.tensor.untyped_storage()._cdata == memory for leaf in self.leaves.values())

    def need_values(self, tensors: list[Tensor]) -> None:
        """Compute the values of masked weights that nothing has read yet."""
        if self.stand_ins:
            self.stand_ins.late.need(tensors)

    def is_used_once(self, name: str) -> bool:
        """Whether one operation alone reads a parameter."""
        return all(self.uses[key] == 1 for key, leaf in self.leaves.items() if leaf.name == name)

    def relabel(self, leaf: Leaf, labels: list[Tensor]) -> None:
        """Give a parameter other labels, before anything has used it."""
        leaf.labels = labels
        self._facts[leaf.tensor] = facts(labels, self.state(leaf.tensor))

    def take_ids(self, tensor: Tensor, ids: Tensor) -> bool:
        """Give a vector of the model the `ids` of what it meets; return whether it got them."""
        name = self._names.get(id(tensor))
        if name is None or name in self._changing or tensor in self._facts:
            return False
        if not _has_channels(tensor) or tensor.shape != ids.shape:
            return False
        self._first_facts(tensor, [ids])
        return True

    def _first_facts(self, tensor: Tensor, labels: list[Tensor] | None = None) -> Facts:
        self._facts[tensor] = found = self._leaf(tensor, labels)
        self._remember_memory(tensor)
        return found

    def _leaf(self, tensor: Tensor, labels: list[Tensor] | None) -> Facts:
        name = self._names.get(id(tensor))
        if name is None:
            return self.facts_of_memory(tensor)
        if labels is None:
            dims = [d for d, size in enumerate(tensor.shape) if size > 1 and _has_channels(tensor)]
            labels = [along(self.ties.new(tensor.shape[d]), d, tensor.shape) for d in dims]
        self.leaves[id(tensor)] = Leaf(name, tensor, labels)
        if name in self._changing:
            for label in labels:
                self.ties.pin(label, f'"{name}" holds what the last call has put there')
            return Facts(tuple(labels), everywhere(UNKNOWN, tensor.shape))
        state = self.dropped.get(name)  # not tidied, which takes long
        return Facts(tuple(labels), everywhere(KNOWN, tensor.shape) if state is None else state)

    def facts_of_memory(self, tensor: Tensor) -> Facts:
        """Return the facts of a tensor that no operation made: another object for it, or a copy."""
        if tensor.layout == torch.strided:
            memory = tensor.untyped_storage()._cdata
            for held in self._held.values():  # which nothing may have read yet
                if held.layout == torch.strided and held.untyped_storage()._cdata == memory:
                    self.facts(held)
            for other, _ in self._in_memory[memory].items():
                if has_layout_of(other, tensor):
                    return self._facts[other]
        return Facts((), everywhere(UNKNOWN, tensor.shape))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        check_can_be_followed(func, tensors_among([*args, *kwargs.values()]), self.module)
        if torch.is_inference_mode_enabled():  # there, composite operations come as a whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func._schema.name.split("::")[1]
        with torch._C.DisableTorchFunction():
            call = self._run(name, func, args, kwargs)
            self._follow(call, list(written(func, args, kwargs)))
            made = self.stand_ins is not None and self.stand_ins.made
            if made and reads_values(name, func, args) and lowest(self, call.tensors()) == UNKNOWN:
                raise ValuesNeeded
        return call.out

    def _run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if name == "_local_scalar_dense" and args[0].is_meta:
            out = torch.ones((), dtype=args[0].dtype).item()  # of a model without values
            return Call(name, args, kwargs, out, func)
        if self.stand_ins:
            self.stand_ins.check(func, args, kwargs)
            stand_in = None if kwargs else self.stand_ins.instead(name, func, args)
            if stand_in is not None:
                return Call(name, args, kwargs, stand_in, func, is_stand_in=True)
            if not func.is_view:
                self.stand_ins.late.need(tensors_among([*args, *kwargs.values()]))
        return Call(name, args, kwargs, func(*args, **kwargs), func)

    def _follow(self, call: Call, writes: list[Tensor]) -> None:
        outs = call.outs()
        check_can_be_followed(call.function, outs, self.module)
        for key in map(id, call.tensors()):
            if key in self._names:
                self.uses[key] += 1
        self.means.follow(call, mutates=bool(writes))
        is_sparse = any(t.layout != torch.strided for t in (*outs, *call.tensors()))
        rule = None if is_sparse else self._rule_for(call)
        found = unknown_operation(self, call) if rule is None else rule(self, call)
        if not self.constants_hold and call.takes_number():
            found = [Facts(each.labels, self._zeros_alone(call, each.state)) for each in found]
        self.write(writes)
        for out, each in zip(outs, found, strict=True):
            self.set_facts(out, each)

    def _zeros_alone(self, call: Call, state: Tensor) -> Tensor:
        """Return the state of what is computed with a number that may come from the input."""
        if call.name.removesuffix("_") not in _SCALES or not call.tensors():
            return everywhere(UNKNOWN, state.shape)
        zero = (compact(self.state(t)) == ZERO for t in call.tensors())
        small = reduce(torch.logical_or, zero) & (compact(state) == ZERO)
        return (small.to(torch.uint8) * ZERO).expand(state.shape)

    def _remember_memory(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided:
            self._in_memory[tensor.untyped_storage()._cdata][tensor] = None


def _has_channels(tensor: Tensor) -> bool:
    """Whether a tensor has channels, unlike a table of indices, a mask, or one without entries."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0


def unknown_operation(trace: Trace, call: Call) -> list[Facts]:
    """Pin all labels that go in; what comes out is unknown unless all that goes in is known."""
    for tensor in call.tensors():
        for label in trace.labels(tensor):
            trace.ties.pin(label, f"unknown operation {call.name}")
    state = lowest(trace, call.tensors())
    return [Facts((), everywhere(state, out.shape)) for out in call.outs()]


def lowest(trace: Trace, tensors: list[Tensor]) -> int:
    """Return KNOWN if all entries of all `tensors` are known, else UNKNOWN."""
    known = all(bool((trace.state(t) != UNKNOWN).all()) for t in tensors if t.numel())
    return KNOWN if known else UNKNOWN
