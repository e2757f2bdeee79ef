"""What a rule does with the tensors that it reaches.

A treatment is a callable that takes the group of tensors of its rule, by name, and returns a mask
(or a module that masks) for each: `dict[name, Tensor] -> dict[name, mask or nn.Module]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parasparse import gates, patterns
from parasparse._by_entry import highest_by_entry
from parasparse._checks import check_sparsity, listed, num_kept
from parasparse._parts import is_spread, spread_like, whole
from parasparse._tables import described
from parasparse.patterns import Pattern, jointly, mask_for, takes_sparsity
from parasparse.scores.entries import Score, is_entrywise, magnitude
from parasparse.soft_mask import SoftMask

Distribution = Callable[[dict[str, torch.Size], float], Mapping[str, float]]
Treatment = Callable[[dict[str, Tensor]], dict[str, Any]]


@dataclass(frozen=True)
class Prune:
    """Score the tensors, and drop the share `sparsity` of their entries with the lowest scores.

    Args:
        sparsity: share of zeros, in [0, 1]; not given where the pattern brings its own.
        score: `(tensor, name) -> scores`, real, of the same shape, higher = keep.
        pattern: `(scores, sparsity) -> mask`.
        scope: "local" gives every tensor this sparsity; "global" ranks all entries (or units) of
            the group jointly, so that the group as a whole has it.
        distribution: `(shapes by name, sparsity) -> sparsity by name`; with "local" only.

    Raises:
        ValueError: a value out of its range, or two that exclude each other.
        TypeError: `sparsity` is no number.

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
            raise TypeError(f"`pattern` must be made first; got the class {self.pattern.__name__}.")
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
            raise ValueError("`sparsity` must be given, the share of zeros in [0, 1]; got None.")
        if self.scope == "global" and self.distribution is not None:
            raise ValueError(
                '`scope` must be "local" with a `distribution`, which decides for each tensor; '
                'got "global".'
            )

    def _check_alone(self) -> None:
        """Raise ValueError if something comes with a pattern that decides by itself."""
        if self.sparsity is not None:
            raise ValueError(
                f"`sparsity` must be left out with {self.pattern}, which decides how much to keep; "
                f"got {self.sparsity}."
            )
        if self.scope == "global":
            raise ValueError(
                f'`scope` must be "local" with {self.pattern}, which decides for each tensor; got '
                '"global".'
            )
        if self.distribution is not None:
            raise ValueError(f"`distribution` must be left out with {self.pattern}; got one.")

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a bool mask for each of `tensors`."""
        if self.sparsity is None:
            return {n: self._mask({n: self._score(t, n)})[n] for n, t in tensors.items()}
        if self.scope == "global":
            return self._ranked(tensors, self.sparsity)
        shares = self._shares(tensors, self.sparsity)
        return {n: self._ranked({n: t}, shares[n])[n] for n, t in tensors.items()}

    def _ranked(self, tensors: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Return the masks of tensors that are ranked together."""
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
                "`distribution` must return a sparsity for each of the tensors "
                f"{listed(tensors)}; got {got}."
            )
        return {n: check_sparsity(share, f"sparsity of {n}") for n, share in shares.items()}

    def _score(self, tensor: Tensor, name: str) -> Tensor:
        if is_spread(tensor):  # each process keeps its part of the scores
            return spread_like(self._score(whole(tensor), name), tensor)
        try:
            result = self.score(tensor, name)
        except Exception as error:
            error.add_note(f"while scoring {name!r}")
            raise
        if not isinstance(result, Tensor) or result.shape != tensor.shape or result.is_complex():
            got = (
                f"{result.dtype} of shape {tuple(result.shape)}"
                if isinstance(result, Tensor)
                else type(result).__name__
            )
            raise ValueError(
                f"`score` must return a real tensor of shape {tuple(tensor.shape)} for {name!r}; "
                f"got {got}."
            )
        return result

    def _mask(self, scores: dict[str, Tensor], *sparsity: float) -> dict[str, Tensor]:
        """Return the masks of tensors that are ranked together."""
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
                got = f" of {mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
                raise ValueError(
                    f"`pattern` must return a bool tensor of shape {tuple(shape)} for {name!r}; "
                    f"got {type(mask).__name__}{got}."
                )
        return masks


@dataclass(frozen=True, eq=False, repr=False)
class Fixed:
    """Give every tensor this mask.

    Args:
        mask: bool, integer or real; tensor, array, nested list or number that broadcasts to the
            tensor; None attaches a mask that is not set yet.
        layout: "out_in" as weights are; "in_out" for a mask whose first dimension is the inputs.

    Raises:
        ValueError: an unknown layout, or "in_out" with fewer than two dimensions.

    Examples:
        >>> Fixed([[1, 0], [1, 1]], layout="in_out")({"w": torch.ones(2, 2)})["w"].tolist()
        [[1, 1], [0, 1]]

    Reference: CustomizedLinear, whose masks are (in, out).
    """

    mask: Any
    layout: Literal["out_in", "in_out"] = field(default="out_in", kw_only=True)

    def __post_init__(self) -> None:
        if self.layout not in ("out_in", "in_out"):
            raise ValueError(f'`layout` must be "out_in" or "in_out"; got {self.layout!r}.')
        if (
            self.layout == "in_out"
            and self.mask is not None
            and torch.as_tensor(self.mask).ndim < 2
        ):
            raise ValueError('`layout="in_out"` must come with a mask of two or more dimensions.')

    def __repr__(self) -> str:
        return f"Fixed({described(self.mask)}, layout={self.layout!r})"

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the mask for each of `tensors`."""
        mask = self.mask
        if mask is not None and self.layout == "in_out":
            mask = torch.as_tensor(mask).transpose(0, 1)
        return dict.fromkeys(tensors, mask)


@dataclass(frozen=True, repr=False)
class Gate:
    """Attach learned soft masks: a `SoftMask` with parameters that train beside the weights.

    Args:
        function: one of `gates.sigmoid` (Continuous Sparsification), `gates.hard_concrete` (L0),
            `gates.straight_through` (movement pruning), `gates.soft_threshold` (STR),
            `gates.variational_dropout`.
        init: what all its parameters are at first; None: see `SoftMask`.
        pattern: of units (channels, blocks, heads), each of which has one logit.
        sparsity: share of zeros, for `straight_through`.

    Raises:
        ValueError: `init` is not finite; arguments that do not go together.

    Examples:
        >>> Gate(init=0.5)({"w": torch.ones(2, 2)})["w"]
        SoftMask((2, 2), init=0.5)
        >>> Gate(gates.hard_concrete, pattern=patterns.channel(0))
        Gate(hard_concrete, pattern=channel(dim=0, norm=None))

    Reference: see each of the functions.
    """

    function: Callable[..., Tensor] = gates.sigmoid
    init: float | None = field(default=None, kw_only=True)
    pattern: Any = field(default=None, kw_only=True)
    sparsity: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.init is not None and not math.isfinite(self.init):
            raise ValueError(f"`init` must be finite; got {self.init}.")
        if self.pattern is None:
            self._made(torch.empty(1))  # refuses what does not go together

    def __repr__(self) -> str:
        name = [] if self.function is gates.sigmoid else [self.function.__name__]
        given = {"init": self.init, "pattern": self.pattern, "sparsity": self.sparsity}
        rest = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        return f"Gate({', '.join(name + rest)})"

    def __call__(self, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Return a `SoftMask` for each of `tensors`."""
        return {name: self._made(tensor) for name, tensor in tensors.items()}

    def _made(self, tensor: Tensor) -> SoftMask:
        return SoftMask(
            tensor, gate=self.function, init=self.init, pattern=self.pattern,
            sparsity=self.sparsity,
        )  # fmt: skip


def keep_nonzero(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks that keep what is not 0 now: the treatment "zeros"."""
    return {name: tensor != 0 for name, tensor in tensors.items()}


def as_treatment(value: Any) -> Treatment | None:
    """Return the treatment that the right side of a rule stands for; None leaves tensors alone.

    Raises:
        TypeError, ValueError: it stands for none.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value != "zeros":
            raise ValueError(
                f'a treatment that is a string must be "zeros"; got {value!r}. None leaves a '
                "tensor dense."
            )
        return keep_nonzero
    if isinstance(value, (nn.Module, type)):
        raise TypeError(
            f"a treatment must not be a module or a class; got {described(value)}. A callable that "
            "returns {name: module} attaches modules of your own."
        )
    if is_array(value):
        return Fixed(value)
    if callable(value):
        return value  # type: ignore[no-any-return]
    return Prune(check_sparsity(value, "rules"))


def is_array(value: object) -> bool:
    """Whether `value` is a tensor, array or list; a scalar of numpy is a number."""
    array = hasattr(value, "__array__") and not isinstance(value, Real)
    return array or isinstance(value, (Tensor, list, tuple))
