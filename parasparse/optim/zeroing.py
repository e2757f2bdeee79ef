"""Sets the state of single entries to 0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.optim.states import Optimizers, groups_of, is_copy, is_plain, kind_of, states_of
from parasparse.sharding.dtensors import fill_
from parasparse.targets.tensors import Target
from parasparse.text import listed


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
    for state in states_of(optimizer, parameter):
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != entries.shape:
                continue
            codes = _codes(name, value, state)
            if codes is not None:
                codes[0].masked_fill_(entries, codes[1])
            elif weights_too or not is_copy(name, value, parameter):
                fill_(value, entries, 0.0)


def check_clearable(optimizer: Optimizers, parameters: list[Tensor]) -> None:
    """Raise TypeError if `zero_entries` cannot clear the state of one of `parameters`."""
    for parameter in parameters:
        for state in states_of(optimizer, parameter):
            for name, value in state.items():
                alike = isinstance(value, Tensor) and value.shape == parameter.shape
                if alike and not _is_clearable(name, value, state):
                    raise TypeError(
                        f'the state "{name}" of {kind_of(optimizer)} is a '
                        f"{type(value).__name__} of {value.dtype}, of which single entries cannot "
                        "be set to 0. Use an optimizer with states in floating point."
                    )


def _is_clearable(name: str, value: Tensor, state: Mapping[str, Any]) -> bool:
    if is_plain(value):
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


def check_in_optimizer(
    optimizer: Optimizers, targets: list[Target], *, even_frozen: bool = False
) -> None:
    """Raise ValueError if a parameter of `targets` is not in `optimizer`, as in one of a copy.

    Parameters that are not trained may be missing, unless `even_frozen`.
    """
    held = {id(parameter) for group in groups_of(optimizer) for parameter in group["params"]}
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
