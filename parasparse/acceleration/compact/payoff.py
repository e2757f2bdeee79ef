"""Measures the layers that use compact weights: a forward and a backward pass.

The model runs once with weights that note the calls of layers and their inputs. Each call is then
repeated with dense, masked and compact weights in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import log2
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from parasparse.acceleration import measure
from parasparse.acceleration.compact.payoff_table import CompactPayoff, CompactPayoffRow
from parasparse.acceleration.compact.weight import HANDLERS, CompactWeight
from parasparse.acceleration.weight import dispatch
from parasparse.acceleration.weight.layers import is_strided
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.apply import apply_mask
from parasparse.masks.mask import Mask
from parasparse.masks.places import Kept, Places
from parasparse.targets.tensors import Target

_LARGEST = 2**28  # entries; a larger weight may not fit into memory when dense
_CONVOLUTIONS = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
# Parts of a weight are other tensors, whose calls nobody notes.
_LAYERS = HANDLERS.keys() - {torch.Tensor.split, torch.Tensor.chunk}


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a layer that used weights; its other tensors are detached."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool]  # device type, dtype, and whether it was on

    def weights(self) -> list[Probe]:
        """Return the weights, each once."""
        return list({id(w): w for w in dispatch.stand_ins_in((self.args, self.kwargs))}.values())

    def key(self) -> str:
        """Return a text that is the same for calls that take the same time."""
        return repr((self.func, tree_map(_described, (self.args, self.kwargs)), self.autocast))

    def rows(self, result: Tensor) -> int:
        """Return the number of rows, given what the call returned."""
        weight, dim = self.weights()[0], -1
        if self.func in _CONVOLUTIONS:
            dim = 1 - weight.ndim
        elif self.args and self.args[0] is weight:  # weight @ x: the rows are columns
            dim = -2 if result.ndim > 1 else -1
        return result.numel() // max(1, result.size(dim))

    def timed(self) -> dict[str, float]:
        """Return the milliseconds of each of the steps."""
        kind, dtype, enabled = self.autocast
        # Without the cache, which would cast a dense weight once for all repetitions.
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return measure.timed(self.steps())

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return functions that run the call and its gradients, by how weights are stored."""
        weights = self.weights()
        trains = {id(w): w.kept.requires_grad for w in weights}
        dense = {id(w): w.plain().detach().requires_grad_(trains[id(w)]) for w in weights}
        masks = {id(w): w.places.mask() for w in weights}
        return {
            "dense": self._step(lambda w: dense[id(w)], list(dense.values())),
            "masked": self._step(
                lambda w: apply_mask(dense[id(w)], masks[id(w)]), list(dense.values())
            ),
            "compact": self._step(
                lambda w: CompactWeight(w.kept, w.places), [w.kept for w in weights]
            ),
        }

    def _step(self, read: Callable[[Any], Tensor], stored: list[Tensor]) -> Callable[[], object]:
        others = [t for t in tree_leaves((self.args, self.kwargs)) if not isinstance(t, Probe)]
        trained = [*stored, *others]
        trained = [t for t in trained if isinstance(t, Tensor) and t.requires_grad]

        def outputs() -> list[Tensor]:
            args, kwargs = (dispatch.replaced(tree, read) for tree in (self.args, self.kwargs))
            found = tree_leaves(self.func(*args, **kwargs))
            return [t for t in found if isinstance(t, Tensor) and t.requires_grad]

        ones = [torch.ones_like(t) for t in outputs()]
        if not ones:
            return outputs
        return lambda: torch.autograd.grad(outputs(), trained, ones, allow_unused=True)


@dataclass(eq=False)
class Notes:
    """The calls of layers in a run of a model.

    Attributes:
        calls: the first of each kind, by key.
        uses: the key of each call, the names of its weights, and its number of rows.
        others: names of weights that other functions read.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    uses: list[tuple[str, list[str], int]] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    def add(self, call: Call, result: Any) -> None:
        """Add a call and what it returned."""
        weights, key = call.weights(), call.key()
        self.calls.setdefault(key, call)
        rows = call.rows(result[0] if isinstance(result, tuple) else result)
        self.uses.append((key, [w.target_name for w in weights], rows))


class Probe(CompactWeight):
    """A compact weight that notes the calls in which it is used."""

    target_name: str
    notes: Notes

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _LAYERS:
            args, kwargs = tree_map(_detached, (args, kwargs))
            call = Call(func, args, kwargs, _autocast(result))
            call.weights()[0].notes.add(call, result)
        elif func not in dispatch.METADATA:
            for probe in dispatch.stand_ins_in((args, kwargs)):
                probe.notes.others.add(probe.target_name)
        return result


def measured(model: nn.Module, targets: list[Target], inputs: Any) -> CompactPayoff:
    """Return the times of the layers of `model` that use the weights of `targets`."""
    with measure.random_numbers_kept(model), torch.inference_mode(False), torch.enable_grad():
        notes = _noted(model, targets, inputs)
        times = {
            key: call.timed()
            for key, call in notes.calls.items()
            if all(weight.numel() <= _LARGEST for weight in call.weights())
        }
    return CompactPayoff(_row(target, notes, times) for target in targets)


def _noted(model: nn.Module, targets: list[Target], inputs: Any) -> Notes:
    notes = Notes()
    with ExitStack() as stack:
        stack.enter_context(_buffers_kept(model))
        for target in targets:
            for sites in target.stacks():
                probe = _probe(target.name, sites[0], notes)
                for site in sites:
                    site.let_stand_in(probe)
                    stack.callback(site.end_stand_in)
        # A compiled model would compile the notes as well.
        with torch.compiler.set_stance("force_eager"):
            measure.called(model, inputs)
    return notes


def _probe(name: str, stack: MaskedParametrizationList, notes: Notes) -> Probe:
    stored, mask = stack.original, stack.mask
    if isinstance(mask, Kept):
        values, places = stored.detach(), mask.places
    else:
        assert isinstance(mask, Mask)
        assert mask.mask is not None
        places = Places.of(mask.mask)
        values = places.right_inverse(stored.detach())
    probe = Probe(values.requires_grad_(stored.requires_grad), places)
    probe.target_name, probe.notes = name, notes
    return probe


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Let `model` write to copies of its buffers, such as the statistics of BatchNorm."""
    own = [m for m in model.modules() if not isinstance(m, (Mask, Places))]
    before = [(module, dict(module._buffers)) for module in own if module._buffers]
    copies = {id(t): t.clone() for _, held in before for t in held.values() if t is not None}
    try:
        for module, held in before:
            module._buffers.update({n: copies.get(id(t), t) for n, t in held.items()})
        yield
    finally:
        for module, held in before:
            module._buffers.clear()
            module._buffers.update(held)


def _row(target: Target, notes: Notes, times: Mapping[str, dict[str, float]]) -> CompactPayoffRow:
    uses = [use for use in notes.uses if target.name in use[1]]
    reason = _reason(target, notes, times)

    def total(way: str) -> float | None:
        return None if reason else sum(times[key][way] for key, *_ in uses)

    return CompactPayoffRow(
        name=target.name,
        shape=tuple(target.shape),
        sparsity=1 - _kept(target) / max(1, target.shape.numel()),
        rows=sum(rows for *_, rows in uses),
        dense_ms=total("dense"),
        masked_ms=total("masked"),
        compact_ms=total("compact"),
        weights=max((len(names) for _, names, _ in uses), default=1),
        reason=reason,
    )


def _reason(target: Target, notes: Notes, times: Mapping[str, object]) -> str:
    """Return why the uses of a weight have no times, or "" if they have."""
    keys = [key for key, names, _ in notes.uses if target.name in names]
    if target.name in notes.others:
        return "read by other functions than layers"
    if not keys:
        return "not used with these inputs"
    return "" if all(key in times for key in keys) else "too large to be dense"


def _kept(target: Target) -> int:
    (mask,) = target.masks()
    if isinstance(mask, Kept):
        return len(mask.places)
    assert isinstance(mask, Mask)
    assert mask.mask is not None
    return int(mask.mask.count_nonzero())


def _detached(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or isinstance(leaf, Probe):
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _described(leaf: Any) -> Any:
    """Return what the time of a call depends on."""
    if isinstance(leaf, Probe):
        # Weights of about the same number of kept entries take the same time.
        kept = leaf.kept
        size = round(10 * log2(1 + len(kept)))
        return tuple(leaf.shape), kept.dtype, kept.device, kept.requires_grad, size
    if isinstance(leaf, Tensor):
        layout = leaf.stride() if is_strided(leaf) else (leaf.layout, leaf.numel())
        sizes = () if leaf.is_nested else tuple(leaf.shape)
        return sizes, layout, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf


def _autocast(result: Any) -> tuple[str, torch.dtype, bool]:
    """Return the state of autocast on the device of `result`."""
    kind = next(leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
