"""The state of an optimizer by the names of its parameters."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from parasparse.targets.tensors import tensors_of
from parasparse.text import listed, nearest


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
