"""Results that modules keep while their mode stays, such as the attention biases of LeViT."""

from __future__ import annotations

from torch import nn


def drop_cached_results(model: nn.Module) -> None:
    """Call `train` of the modules that have their own, in the mode that they are in.

    Some compute a result from their weights once and drop it when their mode is set. The one from
    before the weights were cut has other sizes. All modes stay as they are.
    """
    modes = {module: module.training for module in model.modules()}
    for module, mode in modes.items():
        if type(module).train is not nn.Module.train:
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode
