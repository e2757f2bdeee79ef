"""Scores: saliency of each entry of a tensor. Higher = keep.

A score is any callable `(tensor, name) -> scores` whose result is real and has the tensor's shape.
"""

from parasparse.scores.collecting import collect
from parasparse.scores.saliency import fisher, grasp, movement, snip, synflow, taylor, wanda
from parasparse.scores.statistics import Statistics
from parasparse.scores.weights_alone import Score, entrywise, lamp, magnitude, random, zeros_first

__all__ = [
    "Score",
    "Statistics",
    "collect",
    "entrywise",
    "fisher",
    "grasp",
    "lamp",
    "magnitude",
    "movement",
    "random",
    "snip",
    "synflow",
    "taylor",
    "wanda",
    "zeros_first",
]
