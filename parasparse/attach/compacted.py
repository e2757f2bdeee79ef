"""The check that refuses models with weights of which only the kept entries are stored."""

from torch import nn

from parasparse.attach.reading import masked_stacks
from parasparse.names import join


def check_not_compact(model: nn.Module, what: str, fix: str = "") -> None:
    """Raise RuntimeError if a weight of `model` is compact, which `what` does not support.

    `fix` is another way out than `expand`.
    """
    for name, module in model.named_modules():
        for attr, stack in masked_stacks(module):
            if stack.is_compact:
                raise RuntimeError(
                    f'{what} needs dense weights; "{join(name, attr)}" is compact. Call '
                    f"parasparse.expand(model) first{fix}."
                )
