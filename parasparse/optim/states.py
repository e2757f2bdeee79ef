"""Finds the states and the parameters of optimizers, also of those that wrap others."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from parasparse.sharding.dtensors import PLAIN, is_dtensor

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]

# State entries that hold a copy of the weight rather than a momentum. Add the names that your own
# optimizer uses. An entry that equals the weight is taken for a copy whatever its name.
WEIGHT_COPIES = {
    "z", "x0", "ax", "slow_params", "slow_param", "mov_avg_param", "ema", "master_param",
}  # fmt: skip
# State entries that hold a momentum, most common first. Add the names that your own optimizer uses.
MOMENTA = ["momentum_buffer", "exp_avg", "momentum", "mom", "exp_avg_slow"]


def each_optimizer(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """Return one or several optimizers as a tuple; raise TypeError if they are something else."""
    found = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    other = [each for each in found if not hasattr(each, "param_groups")]
    if other:
        raise TypeError(
            f"`optimizer` must be a torch optimizer; got {other[0]!r:.60}. Several optimizers are "
            "passed as a list."
        )
    return found


def kind_of(optimizer: Optimizers) -> str:
    """Return the names of the classes of one or several optimizers."""
    return " and ".join(type(each).__name__ for each in each_optimizer(optimizer))


def states_of(optimizer: Any, parameter: Tensor) -> Iterator[MutableMapping[str, Any]]:
    """Yield the states of `parameter`, including those of optimizers inside `optimizer`."""
    for each in each_optimizer(optimizer):
        # `state` is a defaultdict, so [] would add an entry.
        yield each.state.get(parameter, {})
        for inner in _inside(each):
            if inner.state is not each.state:
                yield from states_of(inner, parameter)


def _inside(optimizer: Any) -> list[Any]:
    """Return the optimizers that `optimizer` holds in its attributes, whatever they are called."""
    held = [*vars(optimizer).values(), getattr(optimizer, "optimizer", None)]
    found = {id(o): o for o in held if hasattr(o, "param_groups") and hasattr(o, "state")}
    return [each for each in found.values() if each is not optimizer]


def groups_of(optimizer: Optimizers) -> list[dict[str, Any]]:
    """Return the parameter groups of one or several optimizers."""
    return [group for each in each_optimizer(optimizer) for group in each.param_groups]


def is_copy(name: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether a state is a copy of `parameter` rather than a momentum."""
    # A copy in float32 of a weight in bfloat16 equals the weight once it is rounded.
    alike = value.is_floating_point() == parameter.is_floating_point()
    alike = alike and value.device == parameter.device and name not in MOMENTA
    return name in WEIGHT_COPIES or (alike and torch.equal(value.to(parameter.dtype), parameter))


def is_plain(value: Tensor) -> bool:
    """Whether `value` is an ordinary or a distributed tensor, not one that is quantized."""
    return type(value) in PLAIN or is_dtensor(value)


def has_stepped(optimizer: Optimizers, parameter: Tensor) -> bool:
    """Whether `optimizer` has a state for `parameter`."""
    return any(state for state in states_of(optimizer, parameter))


def keeps_momentum(optimizer: Optimizers, parameter: Tensor) -> bool:
    """Whether `optimizer` uses momentum for `parameter`, one of its own."""
    group = next(g for g in groups_of(optimizer) if any(p is parameter for p in g["params"]))
    return "betas" in group or bool(group.get("momentum"))


def momentum_of(optimizer: Optimizers, parameter: Tensor) -> Tensor | None:
    """Return the momentum in the state of `optimizer` for `parameter`, or None.

    It is the first of `MOMENTA` that is there; exp_avg / (sqrt(exp_avg_sq) + 1e-8) with both.

    Reference: sparse_learning, `get_momentum_for_weight`.
    """
    for state in states_of(optimizer, parameter):
        name = next((name for name in MOMENTA if isinstance(state.get(name), Tensor)), None)
        if name is None or not is_plain(state[name]):
            continue
        average, squares = state[name], state.get("exp_avg_sq")
        if name != "exp_avg" or squares is None or squares.shape != average.shape:
            return average  # type: ignore[no-any-return]
        if average.is_complex():  # its squares are those of the real and the imaginary part
            parts = torch.view_as_real(average) / (torch.view_as_real(squares).sqrt() + 1e-8)
            return torch.view_as_complex(parts)
        return average / (squares.sqrt() + 1e-8)  # type: ignore[no-any-return]
    return None
