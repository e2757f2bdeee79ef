"""A ModuleDict for keys that ModuleDict itself refuses."""

from typing import Any

from torch import nn


class AnyNames(nn.ModuleDict):
    """Holds tensors that are called as a method of ModuleDict is, such as `keys` and `values`.

    `functional_call` and exporters find them as attributes (test_laws.py, odd_names).
    """


def _held_first(name: str) -> property:
    def read(self: nn.ModuleDict) -> Any:
        return (
            self._modules[name] if name in self._modules else getattr(super(AnyNames, self), name)
        )

    return property(read)


# No parameter is called as a method of every module is; these are ModuleDict's own.
for _name in [name for name in vars(nn.ModuleDict) if not name.startswith("_")]:
    setattr(AnyNames, _name, _held_first(_name))
