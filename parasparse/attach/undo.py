"""Restores modules if a change to their structure fails half-way."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the classes and attributes of `modules` if the block raises.

    This includes the containers of their parametrizations, but not the values of tensors.
    """
    involved = []
    for module in modules:
        container = module._modules.get("parametrizations")
        involved += [module] if container is None else [module, container, *container.children()]
    saved = [
        (
            module,
            type(module),
            dict(module.__dict__),
            {k: copy.copy(v) for k, v in module.__dict__.items() if isinstance(v, (dict, set))},
        )
        for module in involved
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes, containers in saved:
            object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, contents in containers.items():
                attributes[name].clear()
                attributes[name].update(contents)
        raise
