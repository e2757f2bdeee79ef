"""Masks by scores that depend on one entry each: computed chunk by chunk, never all in memory."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from parasparse.dtypes import widened_dtype
from parasparse.patterns.selection.kth import shaped
from parasparse.patterns.selection.scores import Scores, Scratch, chunk_size
from parasparse.patterns.selection.together import ranked_together
from parasparse.scores.weights_alone import magnitude
from parasparse.sharding.dtensors import is_dtensor, to_local


def highest_by_entry(
    tensors: Mapping[str, Tensor],
    score: Callable[..., Tensor],
    sparsity: float,
    *,
    max_sparsity: float = 1.0,
) -> dict[str, Tensor]:
    """Return the masks of `ranked_together` for entrywise scores of `tensors`, by name.

    `score` is called as `(chunk, name)`. Each process scores its own parts of sharded tensors.
    """
    sources = [_scored(tensor, score, name) for name, tensor in tensors.items()]
    found = ranked_together(sources, sparsity, max_sparsity=max_sparsity)
    masks = shaped(found, list(tensors.values()))
    return dict(zip(tensors, masks, strict=True))


def magnitudes(tensor: Tensor) -> Iterator[Tensor]:
    """Yield |w| of the entries of `tensor` in flat chunks, each valid until the next."""
    flat, scratch = tensor.detach().flatten(), Scratch()
    has_abs = flat.is_floating_point() and widened_dtype(flat.dtype) == flat.dtype
    for chunk in flat.split(chunk_size(flat)):
        yield torch.abs(chunk, out=scratch.like(chunk)) if has_abs else magnitude(chunk)


def _scored(tensor: Tensor, score: Callable[..., Tensor], name: str) -> Scores:
    part = to_local(tensor)
    size, own = chunk_size(part), partial(score, name=name)
    return Scores(
        part.numel(),
        own(part.flatten()[:1]).dtype,
        lambda: magnitudes(part) if score is magnitude else map(own, part.flatten().split(size)),
        lambda indices: own(part.flatten()[indices.to(part.device)]),
        tensor if is_dtensor(tensor) else None,
        name,
    )
