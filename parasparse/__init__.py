"""Masks on any parameter of any PyTorch module: attach them by rules, train, fold them back."""

from parasparse import distributed, distributions, gates, optim, patterns, schedules, scores
from parasparse.acceleration.accelerate import accelerate, accelerated, restore
from parasparse.acceleration.compact.payoff_table import CompactPayoff, CompactPayoffRow
from parasparse.acceleration.fuse import fuse
from parasparse.acceleration.table import Acceleration, AccelerationRow
from parasparse.checkpoints.binarized import binarize_masks
from parasparse.checkpoints.dense import dense_state_dict
from parasparse.checkpoints.loading import load_state_dict
from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.data_sparsifiers.base import BaseDataSparsifier
from parasparse.data_sparsifiers.ready_made import DataNormSparsifier, DataPruner
from parasparse.files.packing import Packed, pack, unpack
from parasparse.masks.gate_kinds import Gated, GateKind, ProductGate
from parasparse.masks.mask import Mask
from parasparse.masks.protocol import MaskModule
from parasparse.masks.soft_mask import SoftMask
from parasparse.oneshot.block_report import BlockReport
from parasparse.oneshot.prune_blocks import prune_blocks
from parasparse.oneshot.reconstruct import reconstruct
from parasparse.oneshot.report import OneShotRow
from parasparse.oneshot.treatment import OneShot
from parasparse.report.plot import plot
from parasparse.report.summary import Summary, SummaryRow, summary
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import Fixed, Gate
from parasparse.rules.types import Rules
from parasparse.scores.statistics import Statistics
from parasparse.shrink.coupled import coupled
from parasparse.shrink.plan import Shrinkage
from parasparse.shrink.shrink import plan_shrink, shrink
from parasparse.shrink.unshrink import unshrink
from parasparse.targets.left_dense import DenseRow
from parasparse.training.continuous import ContinuousSparsification
from parasparse.training.controller import Controller
from parasparse.training.dynamic import moves
from parasparse.training.dynamic.controller import DynamicSparsity
from parasparse.training.dynamic.published_methods import (
    rigl,
    sparse_evolutionary_training,
    sparse_momentum,
)
from parasparse.training.dynamic.view import Masking
from parasparse.training.gradual import GradualPruning
from parasparse.training.history import Update
from parasparse.training.tickets import LotteryTicket
from parasparse.verbs.binarize import binarize
from parasparse.verbs.compact import compact, expand
from parasparse.verbs.compact_payoff import compact_payoff
from parasparse.verbs.dense_gradients import DenseGradients, dense_gradients
from parasparse.verbs.deploy import deploy_masks
from parasparse.verbs.frozen import frozen
from parasparse.verbs.masks import is_sparse, mask_of, named_masks, penalty, stored
from parasparse.verbs.materialize import materialize
from parasparse.verbs.plan import Plan, PlanRow, plan
from parasparse.verbs.sparsify import sparsify
from parasparse.verbs.squash import squash, unsparsify

__version__ = "0.1.0"

__all__ = [
    "Acceleration", "AccelerationRow", "BaseDataSparsifier", "BlockReport", "CompactPayoff",
    "CompactPayoffRow", "ContinuousSparsification", "Controller", "DataNormSparsifier",
    "DataPruner", "DenseGradients", "DenseRow", "DynamicSparsity", "Fixed", "Gate", "GateKind",
    "Gated", "GradualPruning", "LotteryTicket", "Mask", "MaskModule", "Masking", "OneShot",
    "OneShotRow", "Packed", "Plan", "PlanRow", "ProductGate", "Prune", "Rules", "Shrinkage",
    "SoftMask", "Statistics", "Summary", "SummaryRow", "Update", "accelerate", "accelerated",
    "binarize", "binarize_masks", "compact", "compact_payoff", "coupled", "dense_gradients",
    "dense_state_dict", "deploy_masks", "distributed", "distributions", "expand", "frozen", "fuse",
    "gates", "is_sparse", "load_packed", "load_state_dict", "mask_of", "materialize", "moves",
    "named_masks", "optim", "pack", "patterns", "penalty", "plan", "plan_shrink", "plot",
    "prune_blocks", "reconstruct", "restore", "rigl", "save", "schedules", "scores", "shrink",
    "sparse_evolutionary_training", "sparse_momentum", "sparsify", "squash", "stored", "summary",
    "unpack", "unshrink", "unsparsify",
]  # fmt: skip
