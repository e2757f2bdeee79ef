"""The int attributes of modules and their configs."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.shrink.expressions import Attribute
from parasparse.shrink.sizes import Size


def tag_attributes(model: nn.Module) -> dict[Attribute, int]:
    """Replace the int attributes of modules and their configs by `Size`; return what they were."""
    found: dict[Attribute, int] = {}
    seen: set[int] = set()
    for path, holder in holders(model):
        if id(holder) not in seen:
            seen.add(id(holder))
            for name, value in vars(holder).items():  # which stay the same names
                if type(value) in (int, tuple, list):
                    vars(holder)[name] = _tagged(value, path, name, found)
    return found


# Types of most attributes, which are looked at quickly.
_PLAIN = frozenset((int, float, bool, str, tuple, list, dict, set, OrderedDict, type(None)))


def holders(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules and their configs, each with its path."""
    for path, module in model.named_modules():
        yield path, module
        for name, value in list(vars(module).items()):
            if type(value) not in _PLAIN and _is_config(value):
                yield f"{path}.{name}" if path else name, value


def _is_config(value: object) -> bool:
    """Whether `value` is a plain object with attributes, such as the config of transformers."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type, torch.Generator))
        and not callable(value)
        and not type(value).__module__.startswith(("torch", "builtins"))
    )


def _tagged(value: Any, path: str, name: str, found: dict[Attribute, int]) -> Any:
    if name.startswith("_") and name != "_num_heads":
        return value
    if type(value) is int and value > 1:
        attribute = Attribute(path, name)
        found[attribute] = value
        return Size(value, attribute)
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        for index, each in enumerate(value):
            found[Attribute(path, name, index)] = each
        return type(value)(Size(v, Attribute(path, name, i)) for i, v in enumerate(value))
    return value


def holder_of(model: nn.Module, attribute: Attribute) -> Any:
    """Return the object that has `attribute`."""
    return operator.attrgetter(attribute.path)(model) if attribute.path else model


def get_attribute(model: nn.Module, attribute: Attribute) -> Any:
    """Return an attribute of a module or config, or an entry of a tuple there."""
    value = vars(holder_of(model, attribute))[attribute.name]
    return value if attribute.index is None else value[attribute.index]


def set_attribute(model: nn.Module, attribute: Attribute, value: float | None) -> None:
    """Set an attribute of a module or config, or an entry of a tuple there."""
    holder = holder_of(model, attribute)
    if attribute.index is None:
        vars(holder)[attribute.name] = value
        return
    values = list(vars(holder)[attribute.name])
    values[attribute.index] = value
    vars(holder)[attribute.name] = type(vars(holder)[attribute.name])(values)
