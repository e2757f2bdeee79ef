"""Keeps the state of torch optimizers in step with masks and parameter names."""

from parasparse.optim.cutting import add_to_copies, check_cuttable, cut
from parasparse.optim.named_states import load_named_state, named_state
from parasparse.optim.states import (
    MOMENTA,
    WEIGHT_COPIES,
    Optimizers,
    each_optimizer,
    has_stepped,
    keeps_momentum,
    kind_of,
    momentum_of,
)
from parasparse.optim.zeroing import (
    check_clearable,
    check_in_optimizer,
    parameters_of,
    zero_entries,
)

__all__ = [
    "MOMENTA", "WEIGHT_COPIES", "Optimizers", "add_to_copies", "check_clearable",
    "check_cuttable", "check_in_optimizer", "cut", "each_optimizer", "has_stepped",
    "keeps_momentum", "kind_of", "load_named_state", "momentum_of", "named_state",
    "parameters_of", "zero_entries",
]  # fmt: skip
