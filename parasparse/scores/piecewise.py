"""Masks by scores that each entry has by itself: they are computed piece by piece, never held."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from parasparse.patterns.selection.kth import highest_masks, shaped
from parasparse.patterns.selection.source import Scores, Scratch, chunk_size
from parasparse.scores.weights_alone import magnitude
from parasparse.sharding.dtensors import is_dtensor, to_local


def highest_by_entry(
    tensors: Mapping[str, Tensor], score: Callable[..., Tensor], kept: int
) -> dict[str, Tensor]:
    """Return bool masks of the `kept` highest scores of all `tensors` together.

    Args:
        tensors: by name, any shapes; of spread ones each process scores its part.
        score: `(piece, name) -> scores`, of each entry by itself.
        kept: how many, between 0 and the number of all entries. Of equal scores those in earlier
            tensors stay, and there those with lower flat indices.

    Raises:
        ValueError: NaN among the scores.
        TypeError: complex scores.
    """
    sources = [_scored(tensor, score, name) for name, tensor in tensors.items()]
    masks = shaped(highest_masks(sources, kept), list(tensors.values()))
    return dict(zip(tensors, masks, strict=True))


def magnitudes(tensor: Tensor) -> Iterator[Tensor]:
    """Yield |w| of the entries of `tensor`, flat pieces in order; each holds until the next."""
    flat, scratch = tensor.detach().flatten(), Scratch()
    real = flat.is_floating_point() and flat.dtype.itemsize > 1
    for piece in flat.split(chunk_size(flat)):
        # In memory that is used again: fresh memory costs more than the arithmetic.
        yield torch.abs(piece, out=scratch.like(piece)) if real else magnitude(piece)


def _scored(tensor: Tensor, score: Callable[..., Tensor], name: str) -> Scores:
    part = to_local(tensor)
    size, own = chunk_size(part), partial(score, name=name)
    return Scores(
        part.numel(),
        own(part.flatten()[:1]).dtype,
        lambda: magnitudes(part) if score is magnitude else map(own, part.flatten().split(size)),
        lambda places: own(part.flatten()[places.to(part.device)]),
        tensor if is_dtensor(tensor) else None,
        name,
    )
