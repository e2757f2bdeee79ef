"""Patterns: scores and a sparsity in, a bool mask out (True = kept).

A pattern is any callable `(scores, sparsity) -> mask`. A pattern that decides by itself how much to
keep has an attribute `takes_sparsity = False` and is called as `(scores)`. A pattern of units has
the methods `pool(scores)`, one score per unit, and `spread(units, shape)`, the value of its unit
for each entry.

Scores are real, of any shape, and not NaN. Of `n` entries or units, the `num_kept(n, sparsity)`
with the highest scores are kept; among equal scores, those with the lower flat indices.
"""

from parasparse.patterns.blocks_channels_heads import block, channel, head
from parasparse.patterns.n_of_m_and_bands import n_of_m, nearly_diagonal
from parasparse.patterns.ranked import Pattern, chain, jointly, takes_sparsity, unstructured

__all__ = [
    "Pattern", "block", "chain", "channel", "head", "jointly", "n_of_m", "nearly_diagonal",
    "takes_sparsity", "unstructured",
]  # fmt: skip
