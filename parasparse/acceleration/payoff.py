"""What the zeros of a model would buy: multiply-adds, bytes on disk, milliseconds."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from parasparse.acceleration import measure
from parasparse.acceleration.formats.format import FORMATS
from parasparse.acceleration.installing import installed, is_plain, stored_or_masked
from parasparse.acceleration.weight.layers import Use
from parasparse.acceleration.weight.sparse_weight import SparseWeight
from parasparse.files.packing import pack_tensor
from parasparse.targets.tensors import Site, Target, masked_tensors_of


@dataclass(frozen=True)
class Payoff:
    """What is known of one weight.

    Attributes:
        rows: how often a call of the model multiplies an entry, on average; None: not known.
        bytes_packed: of the weight, packed.
        dense_ms: milliseconds of the dense kernel in a call; None: not asked, or not known.
        sparse_ms: of the fastest format, the dense kernel included.
    """

    rows: Fraction | None
    bytes_packed: int
    dense_ms: float | None
    sparse_ms: float | None


def payoffs(model: nn.Module, example_inputs: Any, *, latency: bool) -> dict[Site, Payoff]:
    """Return what each tensor of `model` buys, by its first place.

    Args:
        model: runs once, without gradients and in evaluation mode.
        example_inputs: what it is called with: a tensor, a tuple or a dict.
        latency: measure masked weights of two or more dimensions.
    """
    every = {target.name: target for target in masked_tensors_of(model, pairs=False)}
    targets = {
        name: target
        for name, target in every.items()
        if target.ndim > 1 and (target.masks() or is_plain(target))
    }
    originals = {name: stored_or_masked(target) for name, target in targets.items()}
    probes = {name: SparseWeight(original) for name, original in originals.items()}
    with installed(targets, probes):
        uses = measure.recorded(model, probes, example_inputs).uses
    timed = {n: o for n, o in originals.items() if latency and targets[n].masks()}
    times = measure.time_formats(timed, uses, list(FORMATS))
    result = {}
    for name, target in every.items():
        own = uses.get(name, [None])
        # A part of a fused projection has a share of the outputs.
        known = [(use, _share(use, target)) for use in own if use is not None]
        dense = sparse = None
        if name in times and None not in own:
            at = {m.rows: m for m in times[name]}
            calls = [(at[use.rows], use.times * share) for use, share in known if use.rows]
            dense = float(sum((m.dense_ms or 0) * n for m, n in calls))
            sparse = float(sum((m.chosen_ms or 0) * n for m, n in calls))
        result[target.sites[0]] = Payoff(
            None if None in own else sum((u.rows * u.times * share for u, share in known), _ZERO),
            pack_tensor(target.effective()).nbytes,
            dense,
            sparse,
        )
    return result


_ZERO = Fraction()


def _share(use: Use, target: Target) -> Fraction:
    outputs = target.stored().shape[0]
    return Fraction(use.outputs or outputs, outputs) if outputs else Fraction(1)
