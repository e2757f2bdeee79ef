"""`Prune`: drop the entries with the lowest scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from parasparse import patterns
from parasparse.counts import bounded, check_sparsity
from parasparse.patterns import Pattern, jointly, takes_sparsity
from parasparse.patterns.ranked import check_can_bound, mask_for, number_of
from parasparse.scores.piecewise import highest_by_entry
from parasparse.scores.weights_alone import Score, is_entrywise, magnitude
from parasparse.sharding.dtensors import full_tensor, is_dtensor, laid_out_like
from parasparse.text import listed

Distribution = Callable[[dict[str, torch.Size], float], Mapping[str, float]]


def shares_by(
    distribution: Distribution, shapes: dict[str, torch.Size], sparsity: float
) -> dict[str, float]:
    """Return what a distribution says of each shape, by name; raise ValueError if it does not."""
    shares = distribution(shapes, sparsity)
    if not isinstance(shares, Mapping) or shares.keys() != shapes.keys():
        got = listed(shares) if isinstance(shares, Mapping) else type(shares).__name__
        raise ValueError(
            f"`distribution` must return a sparsity for each of {listed(shapes)}; got {got}."
        )
    return {n: check_sparsity(share, f"sparsity of {n}") for n, share in shares.items()}


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
        max_sparsity: the highest sparsity that any tensor gets, in [0, 1]. Below 1, each tensor
            keeps at least one entry (or unit). With scope "global", the other tensors make up for
            this, and the sparsity of all of them is the same.

    Raises:
        ValueError: a value is out of range, or two arguments exclude each other. On call: with
            scope "global", `max_sparsity` keeps more entries than `sparsity` does.
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
    max_sparsity: float = field(default=1.0, kw_only=True)

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
        if check_sparsity(self.max_sparsity, "max_sparsity") < 1:
            self._check_bound()

    def _check_alone(self) -> None:
        """Raise ValueError for arguments that make sense only together with a sparsity."""
        scope = None if self.scope == "local" else self.scope
        bound = None if self.max_sparsity == 1 else self.max_sparsity
        given = {
            "sparsity": self.sparsity, "scope": scope, "distribution": self.distribution,
            "max_sparsity": bound,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` must be omitted with {self.pattern}, which decides for each tensor "
                    f"how much to keep; got {value!r}."
                )

    def _check_bound(self) -> None:
        """Raise ValueError if `max_sparsity` does not go with the other arguments."""
        check_can_bound(self.pattern)
        if self.distribution is not None:
            raise ValueError(
                "`max_sparsity` must be omitted with a `distribution`, which decides the sparsity "
                "of each tensor. Bind it there, as in functools.partial(erk, max_sparsity=0.99)."
            )
        if self.sparsity is not None and self.max_sparsity < self.sparsity:
            raise ValueError(
                "`max_sparsity` must be at least `sparsity`, or the tensors cannot have that "
                f"sparsity; got {self.max_sparsity} and {self.sparsity}."
            )

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a bool mask for each of `tensors`."""
        if self.sparsity is None:
            return {n: self._mask({n: self.scores_of(t, n)})[n] for n, t in tensors.items()}
        if self.scope == "global":
            return self._ranked(tensors, self.sparsity)
        shares = self.shares(tensors)
        return {n: self._ranked({n: t}, shares[n])[n] for n, t in tensors.items()}

    def _ranked(self, tensors: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Return the masks of tensors that share one sparsity."""
        by_entry = self.pattern is patterns.unstructured and is_entrywise(self.score)
        if not by_entry or any(tensor.is_meta for tensor in tensors.values()):
            return self._mask({n: self.scores_of(t, n) for n, t in tensors.items()}, sparsity)
        score = magnitude if self.score is magnitude else self.scores_of
        if self.scope == "local":
            total = sum(tensor.numel() for tensor in tensors.values())
            sparsity = bounded(total, sparsity, self.max_sparsity)
        return highest_by_entry(tensors, score, sparsity, max_sparsity=self.max_sparsity)

    def shares(self, tensors: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the sparsity of each of `tensors`, which have a shape, for scope "local"."""
        sparsity = self.sparsity or 0.0
        if self.distribution is None:
            return dict.fromkeys(tensors, sparsity)
        return shares_by(self.distribution, {n: t.shape for n, t in tensors.items()}, sparsity)

    def scores_of(self, tensor: Tensor, name: str) -> Tensor:
        """Return the checked scores of `tensor`."""
        if is_dtensor(tensor):  # each process keeps its part
            return laid_out_like(self.scores_of(full_tensor(tensor), name), tensor)
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
                most = self.max_sparsity
                masks = jointly(scores, *sparsity, pattern=self.pattern, max_sparsity=most)
            else:
                masks = {n: self._of_one(s, *sparsity) for n, s in scores.items()}
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

    def _of_one(self, scores: Tensor, *sparsity: float) -> Tensor:
        if self.max_sparsity < 1 and not scores.is_meta:  # which comes with a sparsity
            number = number_of(self.pattern, scores.shape)
            sparsity = (bounded(number, sparsity[0], self.max_sparsity),)
        return mask_for(self.pattern, scores, *sparsity)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
