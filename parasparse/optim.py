"""Keeps the state of torch optimizers in step with masks and parameter names."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.sharding.dtensors import fill_
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed, nearest

State = dict[str, dict[str, Any]]


def zero_entries(optimizer: torch.optim.Optimizer, parameter: Tensor, entries: Tensor) -> None:
    """Set the state of `optimizer` to 0 for some entries of `parameter`.

    This changes each tensor of the parameter's shape: momentum, averages, second moments.

    Args:
        optimizer: any torch optimizer; does nothing if it has no state for `parameter`.
        parameter: a parameter of the optimizer.
        entries: bool, of the parameter's shape; True sets the state to 0.

    Examples:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> zero_entries(optimizer, weight, torch.tensor([True, False]))
        >>> optimizer.state[weight]["momentum_buffer"].tolist()
        [0.0, 1.0]
    """
    # `state` is a defaultdict, so [] would add an entry.
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == entries.shape:
            fill_(value, entries, 0.0)


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """Return the momentum in the state of `optimizer` for `parameter`, or None.

    It is `momentum_buffer`, or exp_avg / (sqrt(exp_avg_sq) + 1e-8), or `exp_avg` alone.

    Reference: sparse_learning, `get_momentum_for_weight`.
    """
    state = optimizer.state.get(parameter, {})
    if state.get("momentum_buffer") is not None:
        return state["momentum_buffer"]  # type: ignore[no-any-return]
    if "exp_avg" not in state:
        return None
    average, squares = state["exp_avg"], state.get("exp_avg_sq")
    if squares is None or squares.shape != average.shape:
        return average  # type: ignore[no-any-return]
    if average.is_complex():  # its squares are those of the real and the imaginary part
        parts = torch.view_as_real(average) / (torch.view_as_real(squares).sqrt() + 1e-8)
        return torch.view_as_complex(parts)
    return average / (squares.sqrt() + 1e-8)  # type: ignore[no-any-return]


def keeps_momentum(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether `optimizer` uses momentum for `parameter`, one of its own."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return "betas" in group or bool(group.get("momentum"))


def check_in_optimizer(
    optimizer: torch.optim.Optimizer, targets: list[Target], *, even_frozen: bool = False
) -> None:
    """Raise ValueError if a parameter of `targets` is not in `optimizer`, as in one of a copy.

    Parameters that are not trained may be missing, unless `even_frozen`.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
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
