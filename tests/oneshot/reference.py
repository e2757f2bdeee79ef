"""One layer in NumPy and float64, from the papers: what the solvers are compared with."""

import itertools

import numpy as np


def error(weights, new, gram):
    """The squared change of the outputs."""
    change = new - weights
    return np.einsum("ij,jk,ik->", change, gram, change)


def damped(gram, damping):
    """H, and which inputs were always 0."""
    gram, dead = gram.copy(), gram.diagonal() == 0
    mean = gram.diagonal().mean()
    gram[dead, dead] = 1
    return gram + damping * mean * np.eye(len(gram)), dead


def highest(scores, kept):
    """The mask of the highest of each row; of equal ones, the first."""
    mask = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def highest_of_groups(scores, kept, size):
    return highest(scores.reshape(-1, size), kept).reshape(scores.shape)


def least_squares(weights, mask, matrix):
    new, wanted = np.zeros_like(weights), weights @ matrix
    for row, kept in enumerate(mask):
        new[row, kept] = np.linalg.solve(matrix[np.ix_(kept, kept)], wanted[row, kept])
    return new


def brain_surgeon(weights, matrix, kept):
    """One row: drop the weight that costs least, invert again, until `kept` are left."""
    weights, alive = weights.copy(), np.arange(len(weights))
    while len(alive) > kept:
        inverse = np.linalg.inv(matrix[np.ix_(alive, alive)])
        gone = np.argmin(weights[alive] ** 2 / inverse.diagonal())
        weights[alive] -= weights[alive[gone]] / inverse[gone, gone] * inverse[gone]
        weights[alive[gone]] = 0
        alive = np.delete(alive, gone)
    return weights


def sparsegpt(weights, matrix, choose, block):
    """Algorithm 1 of SparseGPT: `choose(scores, start, stop)` at each block, or inside of it."""
    weights, size = weights.copy(), len(matrix)
    mask = np.zeros(weights.shape, bool)
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    for column in range(size):
        if column % block == 0:
            chosen = slice(column, min(column + block, size))
            scores = (weights[:, chosen] / upper.diagonal()[chosen]) ** 2
            mask[:, chosen] = choose(scores)
        lost = np.where(mask[:, column], 0, weights[:, column]) / upper[column, column]
        weights[:, column:] -= np.outer(lost, upper[column, column:])
    return weights * mask, mask


def swapped(weights, mask, matrix, swaps):
    """The masks after swaps, each found by trying all: the best to take in, the best to drop."""
    mask = mask.copy()

    def least(row, changed):
        own = slice(row, row + 1)
        return error(weights[own], least_squares(weights[own], changed[None], matrix), matrix)

    def flipped(row, entry):
        return np.where(np.arange(mask.shape[1]) == entry, ~row, row)

    for row, kept in enumerate(mask):
        for _ in range(swaps):
            larger = [flipped(kept, entry) for entry in np.flatnonzero(~kept)]
            taken = min(larger, key=lambda changed: least(row, changed))
            smaller = [flipped(taken, entry) for entry in np.flatnonzero(kept)]
            after = min(smaller, key=lambda changed: least(row, changed))
            if least(row, after) < least(row, kept) * (1 - 1e-9):
                kept[:] = after
    return mask


def best(weights, matrix, kept):
    """The least error of any support of `kept` weights in each row, by trying all."""
    total = 0.0
    for row in weights[:, None]:
        supports = itertools.combinations(range(row.shape[1]), kept)
        masks = [np.isin(np.arange(row.shape[1]), s)[None] for s in supports]
        total += min(error(row, least_squares(row, m, matrix), matrix) for m in masks)
    return total
