"""Float attributes, such as the eps of a norm, that remember where they come from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.shrink.attributes import holders
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.sizes import numbers


class Epsilon(float):
    """A float that remembers the attribute that holds it."""

    attribute: Attribute

    def __new__(cls, value: float, attribute: Attribute) -> Epsilon:
        """Make the float `value`, held by `attribute`."""
        epsilon = super().__new__(cls, value)
        epsilon.attribute = attribute
        return epsilon

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)

    def __deepcopy__(self, memo: Any) -> Epsilon:
        return self


def _arithmetic(function: Callable[..., Any], *, swapped: bool) -> Callable[[Epsilon, Any], Any]:
    """Return a method that computes an ordinary float: the attribute must then stay as it is."""

    def method(self: Epsilon, other: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented
        numbers.get().append(self.attribute)
        return function(other, float(self)) if swapped else function(float(self), other)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _function = getattr(operator, _name)
    setattr(Epsilon, f"__{_name}__", _arithmetic(_function, swapped=False))
    setattr(Epsilon, f"__r{_name}__", _arithmetic(_function, swapped=True))


def tag_epsilons(model: nn.Module) -> None:
    """Replace the positive float attributes of modules and their configs by `Epsilon`."""
    for path, holder in holders(model):
        for name, value in list(vars(holder).items()):
            if type(value) is float and value > 0:
                vars(holder)[name] = Epsilon(value, Attribute(path, name))


def state_epsilons(model: nn.Module) -> None:
    """Give an `nn.RMSNorm` without `eps` the value that it computes with.

    In another dtype, as in a copy in float64, it would compute with another one.
    """
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None and module.weight is not None:
            double = module.weight.dtype == torch.float64
            module.eps = torch.finfo(torch.float64 if double else torch.float32).eps
