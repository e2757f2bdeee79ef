"""Chooses the format of each weight of a model by measurement."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from parasparse.acceleration import measure
from parasparse.acceleration.installing import installed
from parasparse.acceleration.table import AccelerationRow, row_of
from parasparse.acceleration.weight.sparse_weight import Choices, SparseWeight
from parasparse.targets.tensors import Target

_LIKE_LINEAR = (nn.Linear, nn.MultiheadAttention, nn.RNNBase)


def choose_formats(
    model: nn.Module,
    inputs: Any,
    targets: Mapping[str, Target],
    originals: Mapping[str, Tensor],
    names: list[str],
) -> tuple[list[AccelerationRow], set[str]]:
    """Return the fastest formats, and the weights that are used other than in multiplications."""
    probes = {name: SparseWeight(original) for name, original in originals.items()}
    if inputs is None:
        recording = measure.Recording({
            n: measure.guessed_uses(o) if _is_linear(targets[n]) else []
            for n, o in originals.items()
        })  # fmt: skip
    else:
        with installed(targets, probes):
            recording = measure.recorded(model, probes, inputs)
    found = measure.time_formats(originals, recording.uses, names)
    rows = [
        row_of(name, originals[name], m.rows, m.format, m.dense_ms, m.chosen_ms)
        for name, every in found.items()
        for m in every
    ]
    if not rows:
        raise ValueError(
            "`example_inputs` must be given: without them only linear layers can be measured, and "
            "the sparse weights of `model` are in other layers."
            if inputs is None
            else "`model` must multiply with its sparse weights; on these inputs it does not."
        )
    if inputs is not None:
        rows = _without_losses(model, inputs, recording, targets, originals, rows)
    read = {n for n, uses in recording.uses.items() if any(not use or not use.rows for use in uses)}
    return rows, read


def _without_losses(
    model: nn.Module,
    inputs: Any,
    recording: measure.Recording,
    targets: Mapping[str, Target],
    originals: Mapping[str, Tensor],
    rows: list[AccelerationRow],
) -> list[AccelerationRow]:
    """Return `rows` with the dense kernel where a module, or the model, is slower as a whole."""
    used = {n: {use.rows for use in uses if use} for n, uses in recording.uses.items()}
    sparse = {r.name for r in rows if r.format is not None and r.rows in used[r.name]}
    clear = {r.name for r in rows if r.chosen_ms and r.dense_ms and r.chosen_ms < 0.7 * r.dense_ms}

    def gains(call: Callable[[], object], names: set[str]) -> bool:
        made = weights_of([row for row in rows if row.name in names], originals, originals)
        with measure.undisturbed(model):
            return measure.gains(call, partial(installed, targets, made))

    calls = [(m, partial(m, *args, **kwargs)) for m, (args, kwargs) in recording.fused.items()]
    for module, call in [*calls, (model, partial(measure.called, model, inputs))]:
        inside = set(module.modules())
        own = {n for n in sparse if any(site.module in inside for site in targets[n].sites)}
        sparse -= _losing(own, clear, partial(gains, call))
    # The dispatch of a sparse weight takes some microseconds even where the dense kernel runs, so
    # only weights that save time on the example inputs stay sparse.
    return [
        row if row.name in sparse else replace(row, format=None, chosen_ms=row.dense_ms)
        for row in rows
    ]


def _losing(names: set[str], clear: set[str], gains: Callable[[set[str]], bool]) -> set[str]:
    """Return the weights in `names` to keep dense, because a call is not faster with all of them.

    Those that are much faster by themselves, `clear`, may still gain without the others.
    """
    if not names or gains(names):
        return set()
    weak, strong = names - clear, names & clear
    return weak if weak and strong and gains(strong) else names


def weights_of(
    rows: list[AccelerationRow], originals: Mapping[str, Tensor], kept: Collection[str]
) -> dict[str, SparseWeight]:
    """Return the sparse weights by name; without dense values if the name is not in `kept`."""
    choices: dict[str, Choices] = {}
    for row in rows:
        choices[row.name] = (*choices.get(row.name, ()), (row.rows, row.format))
    return {
        name: SparseWeight(originals[name], every, keep_dense=name in kept)
        for name, every in choices.items()
        if any(format_ is not None for _, format_ in every)
    }


def _is_linear(target: Target) -> bool:
    return len(target.shape) == 2 and any(isinstance(s.module, _LIKE_LINEAR) for s in target.sites)
