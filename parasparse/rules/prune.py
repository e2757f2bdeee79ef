"""`Prune`: drop the entries with the lowest scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from parasparse import patterns
from parasparse.counts import check_sparsity, num_kept
from parasparse.patterns import Pattern, jointly, takes_sparsity
from parasparse.patterns.ranked import mask_for
from parasparse.scores.piecewise import highest_by_entry
from parasparse.scores.weights_alone import Score, is_entrywise, magnitude
from parasparse.sharding.dtensors import full_tensor, is_dtensor, laid_out_like
from parasparse.text import listed

Distribution = Callable[[dict[str, torch.Size], float], Mapping[str, float]]


@dataclass(frozen=True)
class Prune:
    """Drop the entries with the lowest scores; `sparsity` is the share to drop.

    Args:
        sparsity: share of zeros, in [0, 1]; omitted if the pattern decides how much to keep.
        score: `(tensor, name) -> scores`, real and of the same shape; the highest are kept.
        pattern: `(scores, sparsity) -> mask`.
        scope: "local" gives every tensor this sparsity; "global" ranks the entries (or units) of
            all tensors of the rule together, and this is the sparsity of all of them combined.
        distribution: `(shapes by name, sparsity) -> sparsity by name`, for scope "local" only.

    Raises:
        ValueError: a value is out of range, or two arguments exclude each other.
        TypeError: `sparsity` is not a number, or another argument is not callable.

    Examples:
        >>> Prune(0.5)({"w": torch.tensor([3.0, 1.0, -2.0, 0.0])})["w"].tolist()
        [True, False, True, False]
    """

    sparsity: float | None = None
    score: Score = field(default=magnitude, kw_only=True)
    pattern: Pattern = field(default=patterns.unstructured, kw_only=True)
    scope: Literal["local", "global"] = field(default="local", kw_only=True)
    distribution: Distribution | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.pattern, type):
            raise TypeError(f"`pattern` must be an instance; got class {self.pattern.__name__}.")
        given = {"score": self.score, "pattern": self.pattern, "distribution": self.distribution}
        for name, value in given.items():
            if not callable(value) and not (name == "distribution" and value is None):
                raise TypeError(f"`{name}` must be a callable; got {value!r}.")
        if self.scope not in ("local", "global"):
            raise ValueError(f'`scope` must be "local" or "global"; got {self.scope!r}.')
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if not takes_sparsity(self.pattern):
            self._check_alone()
        elif self.sparsity is None:
            raise ValueError("`sparsity` must be given, a share of zeros in [0, 1]; got None.")
        if self.scope == "global" and self.distribution is not None:
            raise ValueError('`scope` must be "local" with a `distribution`; got "global".')

    def _check_alone(self) -> None:
        """Raise ValueError for arguments that make sense only together with a sparsity."""
        scope = None if self.scope == "local" else self.scope
        given = {"sparsity": self.sparsity, "scope": scope, "distribution": self.distribution}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must be omitted with {self.pattern}, which decides for each tensor "
                    f"how much to keep; got {value!r}."
                )

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a bool mask for each of `tensors`."""
        if self.sparsity is None:
            return {n: self._mask({n: self._score(t, n)})[n] for n, t in tensors.items()}
        if self.scope == "global":
            return self._ranked(tensors, self.sparsity)
        shares = self._shares(tensors, self.sparsity)
        return {n: self._ranked({n: t}, shares[n])[n] for n, t in tensors.items()}

    def _ranked(self, tensors: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Return the masks of tensors that share one sparsity."""
        by_entry = self.pattern is patterns.unstructured and is_entrywise(self.score)
        if not by_entry or any(tensor.is_meta for tensor in tensors.values()):
            return self._mask({n: self._score(t, n) for n, t in tensors.items()}, sparsity)
        total = sum(tensor.numel() for tensor in tensors.values())
        score = magnitude if self.score is magnitude else self._score
        return highest_by_entry(tensors, score, num_kept(total, sparsity))

    def _shares(self, tensors: dict[str, Tensor], sparsity: float) -> Mapping[str, float]:
        """Return the sparsity of each of `tensors`."""
        if self.distribution is None:
            return dict.fromkeys(tensors, sparsity)
        shares = self.distribution({n: t.shape for n, t in tensors.items()}, sparsity)
        if not isinstance(shares, Mapping) or shares.keys() != tensors.keys():
            got = listed(shares) if isinstance(shares, Mapping) else type(shares).__name__
            raise ValueError(
                f"`distribution` must return a sparsity for each of {listed(tensors)}; got {got}."
            )
        return {n: check_sparsity(share, f"sparsity of {n}") for n, share in shares.items()}

    def _score(self, tensor: Tensor, name: str) -> Tensor:
        if is_dtensor(tensor):  # each process keeps its part
            return laid_out_like(self._score(full_tensor(tensor), name), tensor)
        try:
            result = self.score(tensor, name)
        except Exception as error:
            error.add_note(f"while scoring {name!r}")
            raise
        if not isinstance(result, Tensor) or result.shape != tensor.shape or result.is_complex():
            raise ValueError(
                f"`score` must return a real tensor of shape {tuple(tensor.shape)} for {name!r}; "
                f"got {_kind(result)}."
            )
        return result

    def _mask(self, scores: dict[str, Tensor], *sparsity: float) -> dict[str, Tensor]:
        """Return the masks of the pattern; with scope "global", rank all tensors together."""
        try:
            if self.scope == "global":
                masks = jointly(scores, *sparsity, pattern=self.pattern)
            else:
                masks = {n: mask_for(self.pattern, s, *sparsity) for n, s in scores.items()}
        except (TypeError, ValueError) as error:
            nan = [n for n, s in scores.items() if s.is_floating_point() and s.isnan().any()]
            error.add_note(f"while pruning {listed(nan or scores)}")
            raise
        for name, mask in masks.items():
            shape = scores[name].shape
            if not isinstance(mask, Tensor) or (mask.dtype, mask.shape) != (torch.bool, shape):
                raise ValueError(
                    f"`pattern` must return a bool tensor of shape {tuple(shape)} for {name!r}; "
                    f"got {_kind(mask)}."
                )
        return masks


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
