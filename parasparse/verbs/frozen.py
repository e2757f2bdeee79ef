"""`frozen`: masked tensors computed once for the length of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from parasparse.attach.reading import all_masked_stacks


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Compute each masked tensor of `model` once for the whole block: evaluation, generation.

    Turning grad mode on inside, or changing weights or masks there, is not supported: readings stay
    what they were. A model that serves should be squashed instead. Exporting inside is refused.

    Raises:
        RuntimeError: grad mode is on; a mask is not set.

    Examples:
        >>> from parasparse import sparsify
        >>> model = sparsify(nn.Linear(2, 2), 0.5)
        >>> with torch.no_grad(), frozen(model):
        ...     model.weight is model.weight
        True
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "`frozen` must be entered with grad mode off, or gradients would miss the weights. "
            "Write `with torch.no_grad(), frozen(model):`."
        )
    # A block around this one may hold some already: it lets go of those itself.
    stacks = [stack for stack in all_masked_stacks(model) if stack.frozen is None]
    try:
        for stack in stacks:
            stack.frozen = stack()
        yield model
    finally:
        for stack in stacks:
            stack.__dict__.pop("frozen", None)
