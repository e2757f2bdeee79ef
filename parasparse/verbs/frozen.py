"""`frozen`: a block in which masked tensors are computed once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from parasparse.attach.finding import all_masked_stacks


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Compute each masked tensor of `model` once in the block, for evaluation or generation.

    Inside the block, do not turn on grad mode or change weights or masks: the model would not see
    the changes. The model cannot be exported. Use `squash` for deployment instead.

    Raises:
        RuntimeError: grad mode is on, or a mask is not set.

    Examples:
        >>> model = sparsify(nn.Linear(2, 2), 0.5)
        >>> with torch.no_grad(), frozen(model):
        ...     model.weight is model.weight
        True
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "`frozen` must be entered with grad mode off, because weights would get no gradients. "
            "Write `with torch.no_grad(), frozen(model):`."
        )
    # An outer block may have frozen some already, and will release them.
    stacks = [stack for stack in all_masked_stacks(model) if stack.frozen is None]
    try:
        for stack in stacks:
            stack.frozen = stack()
        yield model
    finally:
        for stack in stacks:
            stack.__dict__.pop("frozen", None)
