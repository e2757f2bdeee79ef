"""`compact_payoff`: measure which layers get faster as compact ones."""

from typing import Any

from torch import nn

from parasparse.acceleration.compact.payoff import measured
from parasparse.acceleration.compact.payoff_table import CompactPayoff
from parasparse.targets.reach import Specs
from parasparse.verbs.compact import check_can_be_compact, chosen_targets


def compact_payoff(
    model: nn.Module, example_inputs: Any, targets: Specs | None = None
) -> CompactPayoff:
    """Return a table of the times of layers with dense, masked and compact weights.

    The model runs forward once, in the mode that it is in, to record the inputs of each layer.
    Then each layer runs forward and backward several times with each kind of weight, in turn. The
    optimizer is not measured; its step is faster with compact weights. Works before and after
    `compact`. Gradients, buffers and torch's random generators do not change.

    Args:
        model: a model with bool masks or compact weights, in training mode.
        example_inputs: inputs of the model as in training, with the same batch size: a tensor, a
            tuple or a dict.
        targets: see `compact`.

    Raises:
        RuntimeError: see `compact`.
        ValueError: see `compact`; or `model` has no masked weight.

    Examples:
        >>> model = sparsify(nn.Linear(64, 64), 0.9)
        >>> payoff = compact_payoff(model, torch.randn(8, 64))
        >>> payoff[0].name, payoff[0].rows, payoff[0].compact_ms > 0
        ('weight', 8, True)
    """
    chosen = chosen_targets(model, targets)
    if not chosen:
        raise ValueError("`model` must have a masked weight. Call parasparse.sparsify first.")
    for target in chosen:
        if not target.is_compact:
            check_can_be_compact(target)
    return measured(model, chosen, example_inputs)
