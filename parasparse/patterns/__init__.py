"""Patterns: scores and a sparsity in, a bool mask out (True = kept).

A pattern is any callable `(scores, sparsity) -> mask`. One that decides by itself how much to keep
has an attribute `takes_sparsity = False` and is called as `(scores)`. One of units has a method
`pool(scores)` that gives a score for each unit, and `spread(units, shape)` that gives each entry
what its unit has.

Everywhere: scores are real, of any shape, and not NaN. Of `n` entries, or units, the
`num_kept(n, sparsity)` with the highest scores stay; of equal ones the one with the lower flat
index.
"""

from parasparse.patterns.fixed import n_of_m, nearly_diagonal
from parasparse.patterns.ranked import Pattern, chain, jointly, takes_sparsity, unstructured
from parasparse.patterns.units import block, channel, head

__all__ = [
    "Pattern", "block", "chain", "channel", "head", "jointly", "n_of_m", "nearly_diagonal",
    "takes_sparsity", "unstructured",
]  # fmt: skip
