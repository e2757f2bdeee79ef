"""The ModuleDict at `module.parametrizations` of a module with masks."""

import sys

import torch
from torch import nn
from torch.nn.utils import parametrize

from parasparse.attach.any_names import AnyNames
from parasparse.attach.stack import MaskedParametrizationList


class Parametrizations(AnyNames):
    """Refuses to give a mask away to torch's `remove_parametrizations`, and to delete it."""

    def __getitem__(self, key: str) -> nn.Module:
        # torch overwrites the stored tensor before it removes the property that reads it
        # (test_stock_functions_that_a_mask_refuses_change_nothing).
        removes = parametrize.remove_parametrizations.__code__
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is removes:
            self._check_plain(key)
        return super().__getitem__(key)

    def __delitem__(self, key: str) -> None:
        self._check_plain(key)
        super().__delitem__(key)

    def _check_plain(self, key: str) -> None:
        if isinstance(self._modules[key], MaskedParametrizationList):
            raise RuntimeError(
                f"torch's remove_parametrizations cannot remove the mask of {key!r}, nor can "
                "`del`. Use parasparse.squash(module) or parasparse.unsparsify(module)."
            )


def put_stack(module: nn.Module, name: str, stack: parametrize.ParametrizationList) -> None:
    """Register `stack` as the parametrizations of tensor `name` of `module`."""
    if "parametrizations" not in module._modules:
        module.add_module("parametrizations", Parametrizations())
    container = module._modules["parametrizations"]
    assert container is not None
    container._modules[name] = stack
