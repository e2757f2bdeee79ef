"""A ModuleDict for keys that ModuleDict itself refuses."""

from typing import Any

from torch import nn


class AnyNames(nn.ModuleDict):
    """Also accepts names of methods, such as `keys` and `values`.

    `functional_call` and exporters read tensors as attributes (test_laws.py, odd_names).
    """


def _entry_or_method(name: str) -> property:
    def read(self: nn.ModuleDict) -> Any:
        held = self._modules
        return held[name] if name in held else getattr(super(AnyNames, self), name)

    return property(read)


# Only ModuleDict's own methods: a parameter cannot have the name of a method of nn.Module.
for _name in [name for name in vars(nn.ModuleDict) if not name.startswith("_")]:
    setattr(AnyNames, _name, _entry_or_method(_name))
