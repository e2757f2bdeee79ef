"""Magnitude, Wanda and SparseGPT as the original programs count, written again in NumPy.

Each takes weights, the Gram matrix, and a sparsity or the name of a pattern. `share_of_...` is the
share of a layer that the original drops, which rounds in ways of its own.
"""

import numpy as np

from tests.oneshot import reference

COLUMNS = 128  # that SparseGPT chooses at a time
PATTERNS = {"4:8": (4, 8), "1:4": (1, 4)}


def wanda(weights, gram, setting):
    scores = np.abs(weights) * np.sqrt(gram.diagonal())
    if setting in PATTERNS:
        return weights * reference.highest_of_groups(scores, *PATTERNS[setting])
    return weights * reference.highest(scores, scores.shape[1] - int(scores.shape[1] * setting))


def magnitude(weights, _, setting):
    scores = np.abs(weights)
    if setting in PATTERNS:
        return weights * reference.highest_of_groups(scores, *PATTERNS[setting])
    return weights * (scores > np.sort(scores, axis=None)[int(scores.size * setting)])


def sparsegpt(weights, gram, setting):
    kept, block = PATTERNS.get(setting, (None, COLUMNS))

    def choose(scores):
        if kept is not None:
            return reference.highest(scores, kept)
        return scores > np.sort(scores, axis=None)[int(scores.size * setting)]

    return reference.sparsegpt(weights, reference.damped(gram, 0.01)[0], choose, block)[0]


def share_of_wanda(_, columns, sparsity):
    return int(columns * sparsity) / columns


def share_of_magnitude(rows, columns, sparsity):
    return (int(rows * columns * sparsity) + 1) / (rows * columns)


def share_of_sparsegpt(rows, columns, sparsity):
    sizes = [min(COLUMNS, columns - start) for start in range(0, columns, COLUMNS)]
    dropped = sum(int(rows * size * sparsity) + 1 for size in sizes)
    return (dropped - 0.49) / (rows * columns)
