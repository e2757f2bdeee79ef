"""Keeps the state of torch optimizers in step with masks and parameter names."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parasparse.sharding.dtensors import PLAIN, fill_, is_dtensor
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed, nearest

State = dict[str, dict[str, Any]]
Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


# State entries that hold a copy of the weight rather than a momentum. Add the names that your own
# optimizer uses. An entry that equals the weight is taken for a copy whatever its name.
WEIGHT_COPIES = {
    "z", "x0", "ax", "slow_params", "slow_param", "mov_avg_param", "ema", "master_param",
}  # fmt: skip
# State entries that hold a momentum, most common first. Add the names that your own optimizer uses.
MOMENTA = ["momentum_buffer", "exp_avg", "momentum", "mom", "exp_avg_slow"]


def zero_entries(
    optimizer: Optimizers,
    parameter: Tensor,
    entries: Tensor,
    *,
    weights_too: bool = False,
) -> None:
    """Set the state of `optimizer` to 0 for some entries of `parameter`.

    This changes each tensor of the parameter's shape: momentum, averages, second moments. Codes of
    8-bit optimizers (bitsandbytes, torchao) are set to the code of 0. Copies of the weight stay.

    Args:
        optimizer: any torch optimizer, one that wraps another, or a sequence of optimizers; does
            nothing if there is no state for `parameter`.
        parameter: a parameter of the optimizer.
        entries: bool, of the parameter's shape; True sets the state to 0.
        weights_too: whether the weights of these entries are set to 0, and so their copies.

    Raises:
        TypeError: a state entry has a dtype or a class that cannot be set to 0.

    Examples:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> zero_entries(optimizer, weight, torch.tensor([True, False]))
        >>> optimizer.state[weight]["momentum_buffer"].tolist()
        [0.0, 1.0]
    """
    check_clearable(optimizer, [parameter])
    for state in _states(optimizer, parameter):
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != entries.shape:
                continue
            codes = _codes(name, value, state)
            if codes is not None:
                codes[0].masked_fill_(entries, codes[1])
            elif weights_too or not _is_copy(name, value, parameter):
                fill_(value, entries, 0.0)


def check_clearable(optimizer: Optimizers, parameters: list[Tensor]) -> None:
    """Raise TypeError if `zero_entries` cannot clear the state of one of `parameters`."""
    for parameter in parameters:
        for state in _states(optimizer, parameter):
            for name, value in state.items():
                alike = isinstance(value, Tensor) and value.shape == parameter.shape
                if alike and not _is_clearable(name, value, state):
                    raise TypeError(
                        f'the state "{name}" of {kind_of(optimizer)} is a '
                        f"{type(value).__name__} of {value.dtype}, of which single entries cannot "
                        "be set to 0. Use an optimizer with states in floating point."
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
        (state, name, value, (weights if _is_copy(name, value, parameter) else part)(value))
        for state in _states(optimizer, parameter)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    for state, name, _, new in found:
        state[name] = new

    def undo() -> None:
        for state, name, old, _ in found:
            state[name] = old

    return undo


def add_to_copies(optimizer: Optimizers, parameter: Tensor, delta: Tensor) -> Callable[[], None]:
    """Add `delta` to the copies of `parameter` in the state; return a function that undoes it."""
    old: list[tuple[Tensor, Tensor]] = []
    for state in _states(optimizer, parameter):
        for name, value in state.items():
            alike = isinstance(value, Tensor) and value.shape == parameter.shape
            if alike and _is_copy(name, value, parameter):
                old.append((value, value.clone()))
                value.add_(delta.to(value))

    def undo() -> None:
        for value, before in old:
            value.copy_(before)

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
            "the state of LBFGS is that of all parameters together, so it cannot be cut. Build a "
            "new optimizer when the weights have changed."
        )
    held = {id(parameter) for group in _groups(optimizer) for parameter in group["params"]}
    trained = [id(parameter) for parameter in parameters if parameter.requires_grad]
    if trained and held.isdisjoint(trained):
        raise ValueError(
            f"`optimizer` must hold parameters that become smaller; none is among its {len(held)}. "
            "Build it with `model.parameters()` of the same model object."
        )
    for parameter in parameters:
        for state in _states(optimizer, parameter):
            for name, value in state.items():
                if not _is_cuttable(value, parameter):
                    raise TypeError(
                        f'the state "{name}" of {kind_of(optimizer)} is no tensor in floating '
                        f"point of its parameter's shape {tuple(parameter.shape)}, so it cannot be "
                        "cut. Leave `optimizer` out, and build a new one afterwards."
                    )


def _is_cuttable(value: object, parameter: Tensor) -> bool:
    """Whether a state has the parameter's shape or does not depend on the shape."""
    if isinstance(value, Tensor):
        codes = value.dtype in (torch.uint8, torch.int8)
        alike = value.shape == parameter.shape and _is_plain(value) and not codes
        return alike or value.numel() <= 1
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return all(tensor.numel() <= 1 for tensor in tensors)


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


def _states(optimizer: Any, parameter: Tensor) -> Iterator[MutableMapping[str, Any]]:
    """Yield the states of `parameter`, including those of optimizers inside `optimizer`."""
    for each in each_optimizer(optimizer):
        # `state` is a defaultdict, so [] would add an entry.
        yield each.state.get(parameter, {})
        for inner in _inside(each):
            if inner.state is not each.state:
                yield from _states(inner, parameter)


def _inside(optimizer: Any) -> list[Any]:
    """Return the optimizers that `optimizer` holds in its attributes, whatever they are called."""
    held = [*vars(optimizer).values(), getattr(optimizer, "optimizer", None)]
    found = {id(o): o for o in held if hasattr(o, "param_groups") and hasattr(o, "state")}
    return [each for each in found.values() if each is not optimizer]


def _groups(optimizer: Optimizers) -> list[dict[str, Any]]:
    return [group for each in each_optimizer(optimizer) for group in each.param_groups]


def _is_clearable(name: str, value: Tensor, state: Mapping[str, Any]) -> bool:
    if _is_plain(value):
        floating = value.is_floating_point() or value.is_complex()
        is_count = not floating and value.dtype not in (torch.uint8, torch.int8)
        return floating or is_count or _codes(name, value, state) is not None
    return _codes(name, value, state) is not None


def _codes(name: str, value: Any, state: Mapping[str, Any]) -> tuple[Tensor, int] | None:
    """Return the codes of a quantized state and the code of 0, or None if it is not quantized."""
    table = getattr(value, "qmap", None)  # torchao
    codes = getattr(value, "codes", None)
    if table is None and value.dtype == torch.uint8:
        table, codes = state.get(f"qmap{name[-1]}"), value  # bitsandbytes: state1 and qmap1
    if table is None or codes is None or codes.shape != value.shape:
        return None
    return codes, int(table.abs().argmin())


def _is_copy(name: str, value: Tensor, parameter: Tensor) -> bool:
    # A copy in float32 of a weight in bfloat16 equals the weight once it is rounded.
    alike = value.is_floating_point() == parameter.is_floating_point()
    alike = alike and value.device == parameter.device and name not in MOMENTA
    return name in WEIGHT_COPIES or (alike and torch.equal(value.to(parameter.dtype), parameter))


def momentum_of(optimizer: Optimizers, parameter: Tensor) -> Tensor | None:
    """Return the momentum in the state of `optimizer` for `parameter`, or None.

    It is the first of `MOMENTA` that is there; exp_avg / (sqrt(exp_avg_sq) + 1e-8) with both.

    Reference: sparse_learning, `get_momentum_for_weight`.
    """
    for state in _states(optimizer, parameter):
        name = next((name for name in MOMENTA if isinstance(state.get(name), Tensor)), None)
        if name is None or not _is_plain(state[name]):
            continue
        average, squares = state[name], state.get("exp_avg_sq")
        if name != "exp_avg" or squares is None or squares.shape != average.shape:
            return average  # type: ignore[no-any-return]
        if average.is_complex():  # its squares are those of the real and the imaginary part
            parts = torch.view_as_real(average) / (torch.view_as_real(squares).sqrt() + 1e-8)
            return torch.view_as_complex(parts)
        return average / (squares.sqrt() + 1e-8)  # type: ignore[no-any-return]
    return None


def _is_plain(value: Tensor) -> bool:
    return type(value) in PLAIN or is_dtensor(value)


def has_stepped(optimizer: Optimizers, parameter: Tensor) -> bool:
    """Whether `optimizer` has a state for `parameter`."""
    return any(state for state in _states(optimizer, parameter))


def keeps_momentum(optimizer: Optimizers, parameter: Tensor) -> bool:
    """Whether `optimizer` uses momentum for `parameter`, one of its own."""
    group = next(g for g in _groups(optimizer) if any(p is parameter for p in g["params"]))
    return "betas" in group or bool(group.get("momentum"))


def check_in_optimizer(
    optimizer: Optimizers, targets: list[Target], *, even_frozen: bool = False
) -> None:
    """Raise ValueError if a parameter of `targets` is not in `optimizer`, as in one of a copy.

    Parameters that are not trained may be missing, unless `even_frozen`.
    """
    held = {id(parameter) for group in _groups(optimizer) for parameter in group["params"]}
    names = {
        target.name: None
        for target in targets
        for parameter in parameters_of(target)
        if (even_frozen or parameter.requires_grad) and id(parameter) not in held
    }
    if names:
        raise ValueError(
            f"`optimizer` must hold the parameters that are masked; {listed(names)} are not among "
            f"its {len(held)}. Build it with `model.parameters()` of the same model object."
        )
    check_clearable(optimizer, [p for target in targets for p in parameters_of(target)])


def parameters_of(target: Target) -> list[Tensor]:
    """Return the tensors of `target` that an optimizer updates."""
    return [tensor for site in target.firsts for tensor in site.originals()]


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of `optimizer` by plain parameter names.

    `optimizer.state_dict()` numbers the parameters in the order in which the optimizer got them.
    That order differs between optimizers that were built before and after `sparsify`. Names do not.

    Args:
        model: dense or masked, wrapped or not.
        optimizer: holds only parameters of `model`.

    Returns:
        `{"state": {name: ...}, "param_groups": [{..., "params": [name, ...]}]}`. The tensors are
        not copied.

    Raises:
        ValueError: the optimizer holds a tensor that is not a parameter of `model`.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> named_state(model, torch.optim.SGD(model.parameters()))["param_groups"][0]["params"]
        ['weight', 'bias']
    """
    names = _names(model)
    unknown = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if unknown:
        raise ValueError(
            f"`optimizer` must hold parameters of `model` only; {len(unknown)} of them, the first "
            f"of shape {tuple(unknown[0].shape)}, are not."
        )
    state = {names[id(p)]: dict(values) for p, values in optimizer.state.items()}
    groups = [
        {**group, "params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def load_named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Load the result of `named_state`, also from a dense into a masked model or vice versa.

    Args:
        model: has the parameters that `state` names.
        optimizer: of the same class, with the same parameters in each group, in any order.
        state: not changed.

    Raises:
        ValueError: a name is not in the model, or a group has other parameters.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> load_named_state(model, optimizer, named_state(model, optimizer))
    """
    names = _names(model)
    held = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    given = [list(group["params"]) for group in state["param_groups"]]
    unknown = [name for group in given for name in group if name not in names.values()]
    if unknown:
        raise ValueError(
            f"`state` must name parameters of `model`; it has no {listed(unknown)}"
            f"{nearest(unknown[0], names.values())}."
        )
    if [sorted(group) for group in held] != [sorted(group) for group in given]:
        raise ValueError(
            "`optimizer` must hold the parameters of `state`, group by group; it has groups of "
            f"{[len(group) for group in held]}, `state` of {[len(group) for group in given]}, or "
            "the groups hold other parameters."
        )
    # torch numbers the parameters of an optimizer through all groups.
    numbers = {name: i for i, name in enumerate(name for group in held for name in group)}
    groups = [
        {**saved, "params": [numbers[name] for name in own]}
        for saved, own in zip(state["param_groups"], held, strict=True)
    ]
    # Copies, because torch's `load_state_dict` would share the tensors with `state`.
    values = {numbers[name]: copy.deepcopy(saved) for name, saved in state["state"].items()}
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _names(model: nn.Module) -> dict[int, str]:
    """Return the plain name of each tensor that an optimizer may hold, by id."""
    names: dict[int, str] = {}
    for target in tensors_of(model, pairs=False):
        parts = target.sites[0].originals()
        for number, tensor in enumerate(parts):
            # weight_norm, for example, stores one weight in several tensors.
            names[id(tensor)] = target.name if len(parts) == 1 else f"{target.name}.{number}"
    for name, parameter in model.named_parameters():
        names.setdefault(id(parameter), name)  # logits of a Gate
    return names
