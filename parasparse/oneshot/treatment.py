"""`OneShot`: masks from the inputs of layers, and kept weights that make up for the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from parasparse import patterns
from parasparse.counts import check_sparsity, whole_number
from parasparse.dtypes import all_finite
from parasparse.masks.new_weights import NewWeights
from parasparse.oneshot.admm import admm
from parasparse.oneshot.named_scores import NAMED
from parasparse.oneshot.problem import Problem, Solution, problem_of
from parasparse.oneshot.report import OneShotRow, row_of
from parasparse.oneshot.solve import by_least_squares, by_obs, by_sparsegpt, chooses_by_column
from parasparse.oneshot.supports import Scope, Support
from parasparse.patterns import Pattern, n_of_m, takes_sparsity
from parasparse.scores.damping import Damped, damped
from parasparse.scores.statistics import Statistics
from parasparse.scores.weights_alone import Score
from parasparse.text import listed

Update = Literal["admm", "least_squares", "obs", "none"]
_UPDATES = ("admm", "least_squares", "obs", "none")


@dataclass(frozen=True)
class OneShot:
    """Prune from the inputs of each layer, and change the kept weights so that outputs stay near.

    Unlike all other treatments, it also writes the stored weights. A tensor that has a mask keeps
    no other entries than this mask does. See `collect` for the statistics, and `prune_blocks`,
    which collects them itself.

    Args:
        sparsity: share of zeros, in [0, 1]; omitted if the pattern decides how much to keep.
        statistics: from `scores.collect(model, grams=True)`.
        score: "sparsegpt", "wanda", "ria", or `(tensor, name) -> scores`; "admm" does not use it.
        pattern: `(scores, sparsity) -> mask`, as for `Prune`.
        scope: "row": each output keeps the same number, "tensor": each tensor has the sparsity,
            "global": all tensors of the rule together. Patterns other than `unstructured` are
            applied to whole tensors, so for them "row" means "tensor".
        update: "admm" chooses mask and weights together; "least_squares" finds the best weights on
            the mask of the score; "obs" is SparseGPT; "none" leaves the weights as they are.
        damping: share of the mean of the diagonal that is added to the Gram matrix, at least 0;
            raised up to 1000 times if it stays singular.
        block: columns at a time, for "obs".
        swaps: how many kept weights of each output may be swapped for dropped ones afterwards, each
            only if the error falls. Takes time and memory for large layers.
        history: a list that gets a row for each tensor.

    Raises:
        ValueError: a value is out of range, or two arguments exclude each other. On call: there are
            no statistics, or a tensor is complex.
        TypeError: `sparsity` is not a number, or another argument is not callable.
        RuntimeError: on call, if no Gram matrix of a tensor was collected, or it stays singular.

    Warns:
        UserWarning: a tensor, or a matrix of a stack, such as an expert, had no input: it is
            pruned by magnitude.

    Examples:
        >>> layer = nn.Linear(8, 4)
        >>> with scores.collect(layer, grams=True) as statistics:
        ...     _ = layer(torch.rand(100, 8))
        >>> sparsify(layer, OneShot(0.5, statistics)).weight.count_nonzero()
        tensor(16)

    Reference: Frantar, Alistarh, "SparseGPT", 2023, arXiv:2301.00774; Meng et al., "ALPS", 2024,
        arXiv:2406.07831.
    """

    sparsity: float | None = None
    statistics: Statistics | None = field(default=None, repr=False)
    score: Literal["sparsegpt", "wanda", "ria"] | Score = field(default="sparsegpt", kw_only=True)
    pattern: Pattern = field(default=patterns.unstructured, kw_only=True)
    scope: Scope = field(default="row", kw_only=True)
    update: Update = field(default="admm", kw_only=True)
    damping: float = field(default=0.01, kw_only=True)
    block: int = field(default=128, kw_only=True)
    swaps: int = field(default=0, kw_only=True)
    history: list[OneShotRow] | None = field(default=None, kw_only=True, repr=False, compare=False)
    # `sparsify` calls it with the present masks too.
    keeps_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.pattern, type) or not callable(self.pattern):
            raise TypeError(f"`pattern` must be a pattern, not a class; got {self.pattern!r}.")
        if not callable(self.score) and self.score not in NAMED:
            raise ValueError(f"`score` must be callable or one of {(*NAMED,)}; got {self.score!r}.")
        _check_one_of("scope", self.scope, ("row", "tensor", "global"))
        _check_one_of("update", self.update, _UPDATES)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if takes_sparsity(self.pattern) != (self.sparsity is not None):
            must = "given, a share of zeros in [0, 1]," if self.sparsity is None else "omitted"
            raise ValueError(f"`sparsity` must be {must} with {self.pattern}; got {self.sparsity}.")
        if self.scope == "global" and not takes_sparsity(self.pattern):
            raise ValueError(f'`scope` must not be "global" with {self.pattern}, which takes none.')
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"`damping` must be at least 0; got {self.damping!r}.")
        if whole_number(self.block, "block") < 1 or whole_number(self.swaps, "swaps") < 0:
            raise ValueError(
                f"`block` must be at least 1 and `swaps` 0; got {self.block} and {self.swaps}."
            )
        is_known = self.pattern is patterns.unstructured or isinstance(self.pattern, n_of_m)
        if self.swaps and not (is_known and self.update in ("admm", "least_squares")):
            raise ValueError(
                "`swaps` must be 0 unless the weights are fitted again, by "
                '`update="admm"` or "least_squares", and the pattern is `unstructured` or `n_of_m`.'
            )

    @torch.no_grad()
    def __call__(
        self, tensors: dict[str, Tensor], masks: Mapping[str, Tensor | None] | None = None
    ) -> dict[str, NewWeights]:
        """Return mask and weights for each of `tensors`, which are 0 where `masks` drop entries."""
        for name, tensor in tensors.items():
            _check_weights(name, tensor)
        with ExitStack() as stack:  # products are of full precision
            for kind in {tensor.device.type for tensor in tensors.values()}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return self._found(tensors, masks or {})

    def _found(
        self, tensors: dict[str, Tensor], held: Mapping[str, Tensor | None]
    ) -> dict[str, NewWeights]:
        statistics = self._statistics()
        found: dict[str, NewWeights] = {}
        rows: dict[str, OneShotRow] = {}
        for names in self._batches(tensors, statistics):
            found.update(self._of_batch({name: tensors[name] for name in names}, held, rows))
        if self.history is not None:
            self.history.extend(rows[name] for name in tensors)
        return {name: found[name] for name in tensors}

    def _of_batch(
        self,
        tensors: dict[str, Tensor],
        held: Mapping[str, Tensor | None],
        rows: dict[str, OneShotRow],
    ) -> dict[str, NewWeights]:
        """Return the results of tensors that are solved together; add their `rows`, if wanted."""
        statistics, hessians = self._statistics(), dict[Any, Damped]()
        problems, found = [], {}
        for name, tensor in tensors.items():
            gram = _gram(statistics, name, tensor)
            key = (gram.data_ptr(), gram.shape) if statistics.count(name) else name
            if key not in hessians:
                hessians[key] = damped(gram, self.damping)
            mask, layout = held.get(name), statistics.layout(name)
            problems.append(problem_of(name, tensor, mask, layout, hessians[key]))
        try:
            solved = self._solved(problems, tensors)
        except ValueError as error:
            error.add_note(f"while pruning {listed(list(tensors))}")
            raise
        for name, solution in solved.items():
            samples = statistics.count(name)
            found[name] = _finished(solution, tensors[name], samples)
            if self.history is not None:
                weights = solution.problem.layout.matrices(found[name].weights)
                rows[name] = row_of(solution, weights, samples)
        return found

    def _statistics(self) -> Statistics:
        if self.statistics is None:
            raise ValueError(
                "`OneShot` needs `statistics`. Give it those of `scores.collect(model, "
                "grams=True)`, or call `prune_blocks`, which collects them."
            )
        return self.statistics

    def _batches(self, tensors: dict[str, Tensor], statistics: Statistics) -> list[list[str]]:
        """Return the names that are solved together, or that share a Gram matrix.

        The largest matrices come first, when there are no new weights beside them yet.
        """
        if self.scope == "global":
            return [list(tensors)]
        groups: dict[Any, list[str]] = {}
        for name in tensors:
            key = statistics.gram(name).data_ptr() if statistics.count(name) else name
            groups.setdefault(key, []).append(name)
        inputs = {n: statistics.layout(n).matrices(t).shape[-1] for n, t in tensors.items()}
        return sorted(groups.values(), key=lambda names: inputs[names[0]], reverse=True)

    def _solved(self, problems: list[Problem], tensors: dict[str, Tensor]) -> dict[str, Solution]:
        support = Support(self.sparsity, self.pattern, self.scope)
        if self.update == "admm":
            return by_least_squares(problems, admm(problems, support), support, self.swaps)
        lazily = self.update == "obs" and self.score == "sparsegpt"
        if lazily and all(chooses_by_column(support, problem) for problem in problems):
            return {p.name: by_sparsegpt(p, support, self.block) for p in problems}
        scores = {p.name: self._scores(p, tensors[p.name]) for p in problems}
        masks = support.masks(scores, problems)
        if self.update == "least_squares":
            return by_least_squares(problems, masks, support, self.swaps)
        if self.update == "obs":
            return {p.name: by_obs(p, masks[p.name], self.block) for p in problems}
        return {p.name: Solution(p, p.weights, masks[p.name]) for p in problems}

    def _scores(self, problem: Problem, tensor: Tensor) -> Tensor:
        if isinstance(self.score, str):
            return NAMED[self.score](problem)
        scores = self.score(tensor, problem.name)
        if not isinstance(scores, Tensor) or scores.shape != tensor.shape or scores.is_complex():
            raise ValueError(
                f"`score` must return a real tensor of shape {tuple(tensor.shape)} for "
                f"{problem.name!r}; got {type(scores).__name__}."
            )
        return problem.layout.matrices(scores)


def _finished(solution: Solution, tensor: Tensor, samples: int) -> NewWeights:
    """Return the result for `tensor`; warn if it had no inputs."""
    problem = solution.problem
    mask = problem.restored(solution.mask)
    weights = problem.restored(solution.weights).to(tensor.dtype)
    # Whatever the weights of dead inputs are, outputs are the same.
    dead = problem.layout.of_inputs(problem.hessian.dead, tensor.shape)
    if bool(dead.any()):
        weights = torch.where(dead, tensor, weights)
    weights = weights.masked_fill(~mask, 0.0)
    if not samples:
        warnings.warn(
            f'"{problem.name}" had no input, so it is pruned by magnitude, and its weights '
            "stay as they are. Collect more inputs, or exclude it.",
            stacklevel=2,
        )
    elif bool(problem.hessian.unseen.any()):
        unseen = problem.hessian.unseen.nonzero().flatten().tolist()
        warnings.warn(
            f'matrices of "{problem.name}" had no input, so they are pruned by magnitude, and '
            f"their weights stay as they are: {listed(unseen)} of {len(problem.weights)}. They "
            "may be experts that saw no token. Collect more inputs.",
            stacklevel=2,
        )
    return NewWeights(mask, weights)


def _gram(statistics: Statistics, name: str, tensor: Tensor) -> Tensor:
    """Return the Gram matrices (groups, in, in) of a tensor; zeros if it had no input."""
    if statistics.count(name):
        gram = statistics.gram(name)
        return gram.reshape(-1, *gram.shape[-2:]).to(tensor.device)
    matrices = statistics.layout(name).matrices(tensor)
    size = matrices.shape[-1]
    return matrices.new_zeros((len(matrices), size, size), dtype=torch.float64)


def _check_weights(name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise ValueError(
            f'`OneShot` prunes real weights; "{name}" is complex, or a pair of a real and an '
            "imaginary tensor. Exclude it, or use `Prune`."
        )
    if tensor.is_meta or not all_finite(tensor):
        raise ValueError(f'the weights of "{name}" must be finite, and not on the meta device.')


def _check_one_of(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{argument}` must be one of {allowed}; got {value!r}.")
