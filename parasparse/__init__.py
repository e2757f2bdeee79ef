"""Masks on any parameter of any PyTorch module: attach them by rules, train, fold them back."""

from parasparse import distributed, distributions, gates, optim, patterns, schedules, scores
from parasparse.contexts import dense_gradients, frozen
from parasparse.data.base import BaseDataSparsifier
from parasparse.data.ready import DataNormSparsifier, DataPruner
from parasparse.masks import deploy_masks, is_sparse, mask_of, named_masks, penalty, stored
from parasparse.parametrizations import Mask
from parasparse.plots import plot
from parasparse.report import summary
from parasparse.soft_mask import SoftMask
from parasparse.sparse.accelerate import accelerate, accelerated, restore
from parasparse.sparse.files import load_packed, save
from parasparse.sparse.packing import Packed, pack, unpack
from parasparse.state import binarize_masks, dense_state_dict, load_state_dict
from parasparse.training import moves
from parasparse.training.continuous import ContinuousSparsification
from parasparse.training.dynamic import DynamicSparsity
from parasparse.training.gradual import GradualPruning
from parasparse.training.methods import rigl, sparse_evolutionary_training, sparse_momentum
from parasparse.training.tickets import LotteryTicket
from parasparse.transforms import binarize, plan, sparsify, squash, unsparsify
from parasparse.treatments import Fixed, Gate, Prune

__version__ = "0.1.0"

__all__ = [
    "BaseDataSparsifier",
    "ContinuousSparsification",
    "DataNormSparsifier",
    "DataPruner",
    "DynamicSparsity",
    "Fixed",
    "Gate",
    "GradualPruning",
    "LotteryTicket",
    "Mask",
    "Packed",
    "Prune",
    "SoftMask",
    "accelerate",
    "accelerated",
    "binarize",
    "binarize_masks",
    "dense_gradients",
    "dense_state_dict",
    "deploy_masks",
    "distributed",
    "distributions",
    "frozen",
    "gates",
    "is_sparse",
    "load_packed",
    "load_state_dict",
    "mask_of",
    "moves",
    "named_masks",
    "optim",
    "pack",
    "patterns",
    "penalty",
    "plan",
    "plot",
    "restore",
    "rigl",
    "save",
    "schedules",
    "scores",
    "sparse_evolutionary_training",
    "sparse_momentum",
    "sparsify",
    "squash",
    "stored",
    "summary",
    "unpack",
    "unsparsify",
]
