"""Scores: a number for each entry of a tensor. The highest are kept.

A score is any callable `(tensor, name) -> scores` that returns a real tensor of the same shape.
"""

from parasparse.scores.collecting import collect
from parasparse.scores.saliency import (
    fisher,
    grasp,
    movement,
    ria,
    snip,
    sparsegpt,
    synflow,
    taylor,
    wanda,
)
from parasparse.scores.statistics import Statistics
from parasparse.scores.weights_alone import Score, entrywise, lamp, magnitude, random, zeros_first

__all__ = [
    "Score", "Statistics", "collect", "entrywise", "fisher", "grasp", "lamp", "magnitude",
    "movement", "random", "ria", "snip", "sparsegpt", "synflow", "taylor", "wanda", "zeros_first",
]  # fmt: skip
