"""Savings by the zeros of a model: multiply-adds, bytes on disk, milliseconds."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from parasparse.acceleration import measure
from parasparse.acceleration.formats.format import FORMATS
from parasparse.acceleration.installing import installed, replaceable, stored_or_masked
from parasparse.acceleration.weight.layers import Use
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from parasparse.files.packing import pack_tensor
from parasparse.targets.tensors import Site, Target, masked_tensors_of


@dataclass(frozen=True)
class Payoff:
    """Costs of one weight."""

    rows: Fraction | None  # how often a call of the model multiplies each entry; None: not known
    bytes_packed: int
    dense_ms: float | None  # per call; None: not measured
    sparse_ms: float | None  # per call with the fastest format, or the dense kernel


def payoffs(model: nn.Module, example_inputs: Any, *, latency: bool) -> dict[Site, Payoff]:
    """Return the multiply-adds, bytes and milliseconds of each tensor, by its first site.

    The model runs once. `latency` measures the masked weights of two or more dimensions.
    """
    targets = {target.name: target for target in masked_tensors_of(model, pairs=False)}
    matrices = {name: target for name, target in targets.items() if replaceable(target)}
    originals = {name: stored_or_masked(target) for name, target in matrices.items()}
    probes = {name: SparseWeight(original) for name, original in originals.items()}
    with installed(matrices, probes):
        uses = measure.recorded(model, probes, example_inputs).uses
    masked = {n: o for n, o in originals.items() if latency and matrices[n].masks()}
    times = measure.time_formats(masked, uses, list(FORMATS))
    return {
        target.sites[0]: _payoff(target, uses.get(name, [None]), times.get(name))
        for name, target in targets.items()
    }


def _payoff(
    target: Target, uses: list[Use | None], times: tuple[measure.Measured, ...] | None
) -> Payoff:
    nbytes = pack_tensor(target.effective()).nbytes
    if None in uses:  # not only multiplied
        return Payoff(None, nbytes, None, None)
    counts = [(use, use.times * _share(use, target)) for use in uses if use is not None]
    rows = sum((use.rows * count for use, count in counts), Fraction())
    if times is None:
        return Payoff(rows, nbytes, None, None)
    at = {measured.rows: measured for measured in times}
    calls = [(at[use.rows], count) for use, count in counts if use.rows]
    dense = float(sum((measured.dense_ms or 0) * count for measured, count in calls))
    sparse = float(sum((measured.chosen_ms or 0) * count for measured, count in calls))
    return Payoff(rows, nbytes, dense, sparse)


def _share(use: Use, target: Target) -> Fraction:
    """Return the share of the outputs that `use` had; fused projections are used in parts."""
    outputs = target.stored().shape[0]
    return Fraction(use.outputs or outputs, outputs) if outputs else Fraction(1)
