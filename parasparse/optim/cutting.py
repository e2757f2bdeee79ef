"""Cuts the state together with a parameter that becomes smaller."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parasparse.optim.states import (
    Optimizers,
    each_optimizer,
    groups_of,
    is_copy,
    is_plain,
    kind_of,
    states_of,
)


def cut(
    optimizer: Optimizers,
    parameter: Tensor,
    part: Callable[[Tensor], Tensor],
    weights: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[], None]:
    """Cut each state of the shape of `parameter`; return a function that undoes it.

    Call it before `parameter` itself is cut, and `check_cuttable` before that.

    Args:
        optimizer: see `zero_entries`.
        parameter: a parameter of the optimizer.
        part: returns the part of a tensor that stays.
        weights: the same for a copy of `parameter`; None: `part`.

    Examples:
        >>> weight = nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> undo = cut(optimizer, weight, lambda tensor: tensor[:2])
        >>> optimizer.state[weight]["momentum_buffer"].shape
        torch.Size([2])
    """
    weights = weights or part
    found = [
        (state, name, value, (weights if is_copy(name, value, parameter) else part)(value))
        for state in states_of(optimizer, parameter)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]

    def undo() -> None:
        for state, name, old, _ in found:
            state[name] = old

    with _undone_on_error(undo):
        for state, name, _, new in found:
            state[name] = new
        return undo


def add_to_copies(optimizer: Optimizers, parameter: Tensor, delta: Tensor) -> Callable[[], None]:
    """Add `delta` to the copies of `parameter` in the state; return a function that undoes it."""
    copies = [
        (value, value.clone())
        for state in states_of(optimizer, parameter)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
        if is_copy(name, value, parameter)
    ]

    def undo() -> None:
        for value, before in copies:
            value.copy_(before)

    with _undone_on_error(undo):
        for value, _ in copies:
            value.add_(delta.to(value))
        return undo


def check_cuttable(optimizer: Optimizers, parameters: Sequence[Tensor]) -> None:
    """Raise an error if `cut` cannot cut the state of one of `parameters`.

    Raises:
        TypeError: a state is not an ordinary tensor of the parameter's shape, nor one number; or
            the optimizer is an LBFGS that has a state.
        ValueError: the optimizer holds none of `parameters`.
    """
    if any(
        isinstance(each, torch.optim.LBFGS) and each.state for each in each_optimizer(optimizer)
    ):
        raise TypeError(
            "LBFGS has one state for all parameters together, which cannot be cut. Leave "
            "`optimizer` out, and build a new one afterwards."
        )
    held = {id(parameter) for group in groups_of(optimizer) for parameter in group["params"]}
    trained = [id(parameter) for parameter in parameters if parameter.requires_grad]
    if trained and held.isdisjoint(trained):
        raise ValueError(
            f"`optimizer` must hold parameters that become smaller; none is among its {len(held)}. "
            "Build it with `model.parameters()` of the same model object."
        )
    for parameter in parameters:
        for state in states_of(optimizer, parameter):
            for name, value in state.items():
                if not _is_cuttable(value, parameter):
                    raise TypeError(
                        f'the state "{name}" of {kind_of(optimizer)} is not a floating-point '
                        f"tensor of its parameter's shape {tuple(parameter.shape)}, so it cannot "
                        "be cut. Leave `optimizer` out, and build a new one afterwards."
                    )


def _is_cuttable(value: object, parameter: Tensor) -> bool:
    """Whether a state has the parameter's shape or does not depend on the shape."""
    if isinstance(value, Tensor):
        codes = value.dtype in (torch.uint8, torch.int8)
        alike = value.shape == parameter.shape and is_plain(value) and not codes
        return alike or value.numel() <= 1
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return all(tensor.numel() <= 1 for tensor in tensors)


@contextmanager
def _undone_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` if the block raises."""
    try:
        yield
    except BaseException:
        undo()
        raise
