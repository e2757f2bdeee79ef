"""Traces a copy of a model, in eval mode, as it is."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)  # fmt: skip
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from parasparse.shrink.attention import let_heads_go
from parasparse.shrink.attributes import tag_attributes
from parasparse.shrink.calls import check_can_be_followed
from parasparse.shrink.carried import Carried
from parasparse.shrink.copies import full_copy, shared_copy
from parasparse.shrink.einops_shapes import computed_shapes
from parasparse.shrink.epsilons import state_epsilons, tag_epsilons
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.facts import UNKNOWN, ZERO, Facts, everywhere
from parasparse.shrink.late_values import LateValues
from parasparse.shrink.layer_sizes import sized_by
from parasparse.shrink.math_functions import math_of_sizes
from parasparse.shrink.outside_torch import followed_parameters
from parasparse.shrink.random_numbers import same_random_numbers
from parasparse.shrink.rules import rule_for
from parasparse.shrink.sizes import own_sizes, telling
from parasparse.shrink.stand_ins import StandIns, ValuesNeeded
from parasparse.shrink.stated_sizes import StatedSizes
from parasparse.shrink.tracing import Trace
from parasparse.targets.tensors import Target

# One run at a time: it changes kernels, global hooks and random states, which all threads share.
ALONE = threading.RLock()
Run: TypeAlias = tuple[Trace, dict[Attribute, int], nn.Module]


def traced(
    model: nn.Module, tensors: list[Target], example_inputs: Any, dropped: dict[str, Tensor]
) -> Run:
    """Run a copy of `model` on `example_inputs`, again if it has changed parameters or buffers.

    Most values are not computed, unless the program reads some that depend on the input.

    Args:
        model: dense or masked.
        tensors: of the model.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        dropped: by name of a parameter or masked buffer, its states: ZERO where an entry is pruned.

    Returns:
        The trace, the int attributes of modules and configs, and the copy.
    """
    changing: frozenset[str] = frozenset()
    while True:
        found = _run(model, tensors, example_inputs, dropped, changing)
        changed = found[0].changes.names(found[2])
        if changed <= changing:
            return found
        changing |= changed


def _run(
    model: nn.Module, tensors: list[Target], example_inputs: Any, dropped: dict[str, Tensor],
    changing: frozenset[str],
) -> Run:  # fmt: skip
    # In inference mode, views do not know what they are views of.
    try:
        with torch.inference_mode(False), ALONE, _without_autocast(model):
            late = LateValues()
            twin = shared_copy(model, tensors, late)
            with same_random_numbers():
                return _traced(twin, example_inputs, dropped, changing, StandIns(twin, late))
    except (ValuesNeeded, Exception):  # an error may come from values that were not computed
        pass
    try:
        with torch.inference_mode(False), ALONE, same_random_numbers():
            return _traced(full_copy(model), example_inputs, dropped, changing, None)
    except Exception as error:
        error.add_note(
            "This happened while a copy of the model ran on `example_inputs`, which must be a "
            "tensor, a tuple of arguments or a dict of keyword arguments; it is of type "
            f"{type(example_inputs).__name__}."
        )
        raise


@own_sizes()
def _traced(
    twin: nn.Module, example_inputs: Any, dropped: dict[str, Tensor], changing: frozenset[str],
    stand_ins: StandIns | None,
) -> Run:  # fmt: skip
    example_inputs = copied_inputs(example_inputs)
    for module in list(twin.modules()):
        let_heads_go(module)
    values = tag_attributes(twin)
    state_epsilons(twin)
    tag_epsilons(twin)
    trace, carried = Trace(twin, dropped, rule_for, stand_ins, changing), Carried(twin)
    for tensor in tree_leaves(example_inputs):
        if isinstance(tensor, Tensor):
            check_can_be_followed(None, [tensor], "")
            trace.set_facts(tensor, Facts((), everywhere(UNKNOWN, tensor.shape)))
        elif isinstance(tensor, (int, float)) and not isinstance(tensor, bool):
            trace.constants_hold = False
    with ExitStack() as stack:
        for each in (torch.no_grad(), _plain_kernels(), _module_names(twin, trace)):
            stack.enter_context(each)
        stack.enter_context(_disable_current_modes())  # those around the call
        stack.enter_context(followed_parameters(trace))
        stack.enter_context(math_of_sizes())
        stack.enter_context(computed_shapes())
        stack.enter_context(StatedSizes(trace))
        stack.enter_context(trace)
        stack.enter_context(telling(trace.compare))
        outputs = call(twin, example_inputs)
    carried.pin(trace)
    trace.settle_sizes(values, partial(sized_by, twin))
    found = tensors_in(outputs)
    if not found:
        raise ValueError(
            f"the model must return a tensor, or an object that holds some; got {outputs!r:.60}. "
            "Without outputs, nothing says which channels are needed."
        )
    for tensor in found:
        trace.means.use(tensor)
        for label in trace.labels(tensor):
            trace.ties.pin(label, "an output of the model")
    return trace, values, twin


def masked_states(tensors: list[Target]) -> dict[str, Tensor]:
    """Return the states of masked tensors, by name: ZERO where the mask drops an entry."""
    kept = {t.name: t.mask() for t in tensors if t.masks()}
    return {name: _zero_unless(mask) for name, mask in kept.items() if mask is not None}


def zero_states(tensors: list[Target]) -> dict[str, Tensor]:
    """Return the states of parameters, by name: ZERO where an entry is 0."""
    values = {t.name: t.stored() for t in tensors if not t.is_buffer}
    return {name: _zero_unless(t != 0) for name, t in values.items() if not t.is_meta}


def _zero_unless(kept: Tensor) -> Tensor:
    return ZERO - kept.cpu().view(torch.uint8)  # KNOWN where it is True


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def copied_inputs(example_inputs: Any, cast: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
    """Return a copy of `example_inputs`, into which the program may write, with tensors `cast`."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cast(value.detach()).clone()
        return copy.deepcopy(value)

    return tree_map(copied, example_inputs)


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return the tensors in the outputs of a model: in containers, and attributes of objects.

    The keys and values in a cache, an object of a class named so, are no outputs: they may become
    smaller.
    """
    return list(_tensors_in(outputs, set()))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (tuple, list, set, frozenset, deque)):
        parts = value
    elif is_dataclass(value) or _has_outputs(value):
        parts = vars(value).values()
    if parts and id(value) not in seen:
        seen.add(id(value))
        for part in parts:
            yield from _tensors_in(part, seen)


def _has_outputs(value: object) -> bool:
    """Whether `value` is an object such as a distribution, whose attributes are outputs."""
    if isinstance(value, (nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return not any(kind.__name__.endswith("Cache") for kind in type(value).__mro__)


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Have products read Parameters as they are stored, so that constants can be added to them."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter in model.parameters()}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Have attention, recurrent layers and encoders run as the operations that they consist of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TF32, which `flags` sets as well
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _module_names(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Tell `trace` which module runs."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def entering(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            stack.append(trace.module)
            trace.module = names[id(module)]

    def leaving(module: nn.Module, *_: Any) -> None:
        if id(module) in names:
            trace.module = stack.pop()

    hooks = (  # of all modules: to give each its own takes longer than the run of a small one
        register_module_forward_pre_hook(entering),
        register_module_forward_hook(leaving, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
