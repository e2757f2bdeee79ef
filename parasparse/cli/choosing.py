"""Chooses masks for the tensors of a checkpoint, holding one tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from parasparse.attach.pair_stack import joined
from parasparse.cli.reaching import Reached
from parasparse.counts import bounded
from parasparse.files.checkpoint import Checkpoint, CheckpointError
from parasparse.patterns import jointly, unstructured
from parasparse.patterns.blocks_channels_heads import has_units
from parasparse.patterns.selection.scores import Scores, chunk_size
from parasparse.patterns.selection.together import ranked_together
from parasparse.rules.prune import Prune
from parasparse.scores.piecewise import magnitudes
from parasparse.scores.weights_alone import magnitude


def masks(
    source: Checkpoint, group: list[Reached], see: Callable[[Reached], None]
) -> Iterator[tuple[Reached, Tensor]]:
    """Yield the mask of each tensor of `group`, which one rule reaches.

    Each tensor is read once. To rank entries it is read three times: a sample to bracket the
    threshold, all to find it, all to compare. `see` is called with each tensor read to be ranked.
    """
    prune = group[0].rule.prune
    assert prune is not None
    try:
        if prune.scope == "global":
            yield from _ranked_together(source, group, prune, see)
            return
        shares = dict.fromkeys((each.name for each in group), prune.sparsity)
        if prune.distribution is not None and prune.sparsity is not None:
            shapes = {e.name: torch.Size(source.infos[e.parts[0]].shape) for e in group}
            shares.update(prune.distribution(shapes, prune.sparsity))
        for each in group:
            own = replace(prune, sparsity=shares[each.name], distribution=None)
            if own.pattern is unstructured:  # in chunks that fit the cache
                assert own.sparsity is not None
                numel = source.infos[each.parts[0]].numel
                own = replace(own, sparsity=bounded(numel, own.sparsity, own.max_sparsity))
                yield from _ranked_together(source, [each], own, see)
                continue
            yield each, own({each.name: _tensor(source, each)})[each.name]
    except (TypeError, ValueError) as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        raise CheckpointError(f"{error} {f'({notes})' if notes else ''}".strip()) from error


def _ranked_together(
    source: Checkpoint, group: list[Reached], prune: Prune, see: Callable[[Reached], None]
) -> Iterator[tuple[Reached, Tensor]]:
    assert prune.sparsity is not None
    scored = [_Scored(source, each, prune, see) for each in group]
    if has_units(prune.pattern):
        units = {
            each.name: prune.pattern.pool(one.whole())
            for each, one in zip(group, scored, strict=True)
        }
        kept = jointly(units, prune.sparsity, max_sparsity=prune.max_sparsity)
        for each in group:
            shape = torch.Size(source.infos[each.parts[0]].shape)
            yield each, prune.pattern.spread(kept[each.name], shape)
        return
    if prune.pattern is not unstructured:
        raise ValueError(f'`scope` must be "local" with {prune.pattern}.')
    sources = [one.source() for one in scored]
    found = ranked_together(sources, prune.sparsity, max_sparsity=prune.max_sparsity)
    for each, mask in zip(group, found, strict=True):
        yield each, mask.view(source.infos[each.parts[0]].shape)


class _Scored:
    """The scores of one tensor, computed in each pass; random ones are the same each time."""

    def __init__(
        self, source: Checkpoint, each: Reached, prune: Prune, see: Callable[[Reached], None]
    ) -> None:
        self._source, self._each, self._prune, self._see = source, each, prune, see
        self._state = torch.get_rng_state()
        if prune.score is not magnitude:  # draws in the order of `sparsify`
            torch.rand(source.infos[each.parts[0]].shape)

    def whole(self) -> Tensor:
        """Return the scores."""
        tensor = self._seen()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            return self._prune.score(tensor, self._each.name)

    def source(self) -> Scores:
        """Return the scores to be ranked."""
        info = self._source.infos[self._each.parts[0]]
        if self._prune.score is not magnitude:
            dtype, chunks, at = torch.float32, self._split, self._at
        else:
            like = torch.empty(0, dtype=info.dtype)
            like = like if len(self._each.parts) == 1 else joined(like, like)
            dtype, chunks, at = magnitude(like).dtype, self._magnitudes, self._magnitudes_at
        return Scores(info.numel, dtype, chunks, at, name=self._each.name)

    def _seen(self) -> Tensor:
        self._see(self._each)
        return _tensor(self._source, self._each)

    def _split(self) -> Iterator[Tensor]:
        scores = self.whole().flatten()
        yield from scores.split(chunk_size(scores))

    def _at(self, index: Tensor) -> Tensor:
        return self.whole().flatten()[index]

    def _magnitudes(self) -> Iterator[Tensor]:
        yield from magnitudes(self._seen())

    def _magnitudes_at(self, index: Tensor) -> Tensor:
        return magnitude(_tensor(self._source, self._each).flatten()[index])


def _tensor(source: Checkpoint, each: Reached) -> Tensor:
    parts = [source.read(name) for name in each.parts]
    return parts[0] if len(parts) == 1 else joined(*parts)
