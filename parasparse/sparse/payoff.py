"""What the zeros of a model would buy: multiply-adds, bytes on disk, milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from parasparse._tensors import Site, collect_as_masked
from parasparse.sparse import measure
from parasparse.sparse.formats import FORMATS
from parasparse.sparse.packing import pack_tensor
from parasparse.sparse.places import executable, installed, is_plain
from parasparse.sparse.weight import SparseWeight


@dataclass(frozen=True)
class Payoff:
    """What is known of one weight.

    Attributes:
        rows: how often a call of the model multiplies each entry; None: not known.
        bytes_packed: of the weight, packed.
        dense_ms: milliseconds of the dense kernel in a call; None: not asked, or not known.
        sparse_ms: of the fastest format, the dense kernel included.
    """

    rows: int | None
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
    every = {target.name: target for target in collect_as_masked(model, pairs=False)}
    targets = {
        name: target
        for name, target in every.items()
        if target.ndim > 1 and (target.masks() or is_plain(target))
    }
    originals = {name: executable(target) for name, target in targets.items()}
    probes = {name: SparseWeight(original) for name, original in originals.items()}
    with installed(targets, probes):
        uses = measure.recorded(model, probes, example_inputs).uses
    timed = {n: o for n, o in originals.items() if latency and targets[n].masks()}
    times = measure.measured(timed, uses, list(FORMATS))
    result = {}
    for name, target in every.items():
        own = uses.get(name, [None])
        dense = sparse = None
        if name in times and None not in own:
            at = {m.rows: m for m in times[name]}
            calls = [(at[use.rows], use.times) for use in own if use and use.rows]
            dense = sum(m.dense_ms * n for m, n in calls)
            sparse = sum(m.chosen_ms * n for m, n in calls)
        result[target.sites[0]] = Payoff(
            None if None in own else sum(use.rows * use.times for use in own if use),
            pack_tensor(target.effective()).nbytes,
            dense,
            sparse,
        )
    return result
