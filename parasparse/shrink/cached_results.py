"""Results that modules keep while their mode stays, such as the attention biases of LeViT."""

from __future__ import annotations

import inspect

from torch import nn


def drop_cached_results(model: nn.Module) -> None:
    """Set the mode of the modules that do so in their own way to the one that they are in.

    Some compute a result from their weights once and drop it when their mode is set. The one from
    before the weights were cut has other sizes. All modes stay as they are.
    """
    modes = {module: module.training for module in model.modules()}
    own = [module for module in modes if type(module).train is not nn.Module.train]
    for module in own:
        # Another function of this name, such as YOLO's, may train.
        if "mode" in inspect.signature(module.train).parameters:
            module.train(modes[module])
    for module, mode in modes.items():
        module.training = mode
