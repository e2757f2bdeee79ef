"""Data sparsifiers by the norm of blocks, and by any `Prune`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parasparse.counts import check_sparsity, whole_number
from parasparse.data_sparsifiers.base import BaseDataSparsifier
from parasparse.patterns import block
from parasparse.patterns.tiles import tiled
from parasparse.rules.prune import Prune


class DataNormSparsifier(BaseDataSparsifier):
    """Masks the smallest entries in the blocks with the smallest mean.

    Blocks tile the last dimensions from index 0 and are cut off at the far edges. Tensors with
    fewer dimensions than a block are treated as rows. The score of a block is the mean of |x| or
    |x|^2. Of `n` blocks, the `n - num_kept(n, sparsity_level)` with the lowest scores lose their
    `zeros_per_block` smallest entries.

    Args:
        data_list: pairs (name, data) to add.
        sparsity_level: share of the blocks, in [0, 1].
        zeros_per_block: between 0 and the entries of a block; None: all entries.
        sparse_block_shape: size of a block along the last dimensions.
        norm: "L1" or "L2".
        **defaults: further default configuration.

    Raises:
        ValueError: a value is out of range, at construction or in `step`, or the data has NaN.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0, 5.0, 6.0]])
        >>> sparsifier = DataNormSparsifier([("x", x)], 0.5, 1, (1, 2))
        >>> sparsifier.step()
        >>> sparsifier.get_mask("x").tolist()
        [[0.0, 1.0, 1.0, 1.0]]

    Reference: torch.ao.pruning's DataNormSparsifier. Differs: data may have any number of
        dimensions, levels outside [0, 1] raise ValueError, masks keep their dtype.
    """

    def __init__(
        self, data_list: Iterable[tuple[str, Any]] | None = None, sparsity_level: float = 0.5,
        zeros_per_block: int | None = None, sparse_block_shape: Sequence[int] = (1, 1),
        norm: str = "L1", **defaults: Any,
    ) -> None:  # fmt: skip
        if norm not in ("L1", "L2"):
            raise ValueError(f'`norm` must be "L1" or "L2"; got {norm!r}.')
        shape, _ = _checked(sparsity_level, sparse_block_shape, zeros_per_block)
        self.norm = norm
        super().__init__(
            data_list, sparsity_level=sparsity_level, zeros_per_block=zeros_per_block,
            sparse_block_shape=shape, **defaults,
        )  # fmt: skip

    def update_mask(
        self, name: str, data: Tensor, sparsity_level: float, sparse_block_shape: Sequence[int],
        zeros_per_block: int | None, **config: Any,
    ) -> None:  # fmt: skip
        """Set the mask of `name`."""
        shape, zeros = _checked(sparsity_level, sparse_block_shape, zeros_per_block)
        # In 64 bits, squares do not underflow, and the smallest integer has an absolute value.
        wide = data.to(torch.complex128 if data.is_complex() else torch.float64)
        scores = wide.abs() if self.norm == "L1" else wide.abs().square()
        # Give scores and block the same number of dimensions, and fit the block into the scores.
        scores = scores.reshape([1] * (len(shape) - data.ndim) + list(data.shape))
        shape = (1,) * (scores.ndim - len(shape)) + shape
        shape = tuple(min(size, max(n, 1)) for size, n in zip(shape, scores.shape, strict=True))
        kept = block(shape)(scores, sparsity_level)
        if zeros < math.prod(shape):
            kept |= _all_but_smallest(scores, shape, zeros)
        self.get_mask(name).copy_(kept.view(data.shape))


class DataPruner(BaseDataSparsifier):
    """Masks data as a `Prune` masks weights.

    The configuration of each data is its `sparsity`, which schedulers may change. With
    `scope="global"`, data with the same sparsity is ranked together.

    Args:
        prune: sparsity, score, pattern, scope and distribution.
        data_list: pairs (name, data) to add.

    Raises:
        TypeError: `prune` is not a `Prune`.

    Examples:
        >>> x = torch.tensor([3.0, 1.0, -2.0, 0.0])
        >>> pruner = DataPruner(Prune(0.5), [("x", x)])
        >>> pruner.step()
        >>> pruner.get_mask("x").tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    def __init__(self, prune: Prune, data_list: Iterable[tuple[str, Any]] | None = None) -> None:
        if not isinstance(prune, Prune):
            raise TypeError(f"`prune` must be a `Prune`; got {prune!r}.")
        self.prune = prune
        super().__init__(data_list, sparsity=prune.sparsity)

    def step(self) -> None:
        """Compute all masks again from the unmasked data."""
        if not self.enable_mask_update:
            return
        groups: dict[float | None, dict[str, Tensor]] = {}
        for name, data in self._masked_data().items():
            groups.setdefault(self.data_groups[name]["sparsity"], {})[name] = data
        with torch.no_grad():
            masks: dict[str, Tensor] = {}
            for sparsity, tensors in groups.items():
                masks |= replace(self.prune, sparsity=sparsity)(tensors)
            for name, mask in masks.items():
                self.get_mask(name).copy_(mask)

    def update_mask(
        self, name: str, data: Tensor, sparsity: float | None = None, **config: Any
    ) -> None:
        """Set only the mask of `name`."""
        self.get_mask(name).copy_(replace(self.prune, sparsity=sparsity)({name: data})[name])


def _checked(
    sparsity_level: float, sparse_block_shape: Sequence[int], zeros_per_block: int | None
) -> tuple[tuple[int, ...], int]:
    """Return the shape of a block and its number of zeros."""
    check_sparsity(sparsity_level, "sparsity_level")
    shape = tuple(whole_number(size, "sparse_block_shape") for size in sparse_block_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"`sparse_block_shape` must hold sizes > 0; got {shape}.")
    entries = math.prod(shape)
    zeros = entries if zeros_per_block is None else whole_number(zeros_per_block, "zeros_per_block")
    if not 0 <= zeros <= entries:
        raise ValueError(
            f"`zeros_per_block` must be between 0 and {entries}, the number of entries of a block "
            f"{shape}; got {zeros}."
        )
    return shape, zeros


def _all_but_smallest(scores: Tensor, tile: Sequence[int], zeros: int) -> Tensor:
    """Return False for the `zeros` smallest entries of each tile, True elsewhere."""
    cells = tiled(scores, tile, fill=math.inf)
    inside, last = list(range(1, cells.ndim, 2)), list(range(-len(tile), 0))
    entries = cells.movedim(inside, last)
    flat = entries.flatten(-len(tile))
    order = flat.argsort(dim=-1, descending=True, stable=True)  # the first of equal ones stays
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept.scatter_(-1, order[..., flat.shape[-1] - zeros :], False)
    whole_tiles = [a * b for a, b in zip(cells.shape[::2], tile, strict=True)]
    kept = kept.view(entries.shape).movedim(last, inside).reshape(whole_tiles)
    return kept[tuple(slice(size) for size in scores.shape)]
