"""Masks for the tensors of a checkpoint, by rules, without holding more than one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from parasparse._checks import num_kept
from parasparse._pair_stack import joined
from parasparse._select import Scratch, Source, check_ranked, chunk_size, masks_of
from parasparse._tensors import Target, collect
from parasparse._units import has_units
from parasparse.cli.checkpoint import Checkpoint, CheckpointError
from parasparse.cli.folding import computed
from parasparse.cli.rules import Rule
from parasparse.patterns import jointly, unstructured
from parasparse.scores.entries import magnitude
from parasparse.targets import group_by_rule
from parasparse.treatments import Prune


@dataclass(frozen=True, eq=False)
class Reached:
    """A tensor that a rule reaches, or a pair.

    Attributes:
        name: of the tensor; the joint one of a pair.
        parts: the names of its tensor, or of its real and imaginary one.
        rule: the rule.
    """

    name: str
    parts: tuple[str, ...]
    rule: Rule


def reached(source: Checkpoint, rules: list[Rule]) -> list[list[Reached]]:
    """Return what each rule that prunes reaches: what it would in a model with these tensors.

    But for buffers: a checkpoint does not tell them from parameters, unless they are integers.

    Raises:
        CheckpointError: a rule reaches nothing, or what cannot be masked.
    """
    _check_plain(source, rules)
    model, names = _model_of(source)
    targets = collect(model)
    # A glob of biases reaches nothing that could be pruned, and says no more than that they stay.
    rules = [rule for rule in rules if not _is_idle(rule, source)]
    try:
        groups = group_by_rule({n: rule.target for n, rule in enumerate(rules)}, targets)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found = []
    for number, group in groups.items():
        if rules[number].prune is not None:
            found.append([_reached(target, names, rules[number]) for target in group])
    for each in (one for group in found for one in group):
        dtype = source.infos[each.parts[0]].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise CheckpointError(
                f'a pruned tensor must be real or complex; "{each.name}" is {dtype}. Put '
                f"--rule '{each.name}=none' before its rule."
            )
    return found


def masks(
    source: Checkpoint, group: list[Reached], see: Callable[[Reached], None]
) -> Iterator[tuple[Reached, Tensor]]:
    """Yield the mask of each tensor that one rule reaches.

    Args:
        source: read once for each tensor, or three times where all are ranked together.
        group: what the rule reaches.
        see: told of each tensor that is read only to be ranked.

    Raises:
        CheckpointError: scores are NaN; the pattern does not fit.
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
            if own.pattern is unstructured:  # in the cache, piece by piece
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
        kept = jointly(units, prune.sparsity)
        for each in group:
            shape = torch.Size(source.infos[each.parts[0]].shape)
            yield each, prune.pattern.spread(kept[each.name], shape)
        return
    if prune.pattern is not unstructured:
        raise ValueError(f'`scope` must be "local" with {prune.pattern}.')
    sources = [one.source() for one in scored]
    number = num_kept(sum(one.numel for one in sources), prune.sparsity)
    for each, mask in zip(group, masks_of(sources, number), strict=True):
        yield each, mask.view(source.infos[each.parts[0]].shape)


class _Scored:
    """The scores of one tensor, computed anew at each pass: random ones are the same again."""

    def __init__(
        self, source: Checkpoint, each: Reached, prune: Prune, see: Callable[[Reached], None]
    ) -> None:
        self._source, self._each, self._prune, self._see = source, each, prune, see
        self._state, self._is_checked = torch.get_rng_state(), False
        if prune.score is not magnitude:  # all are drawn in turn, as in Python, whoever asks first
            torch.rand(source.infos[each.parts[0]].shape)

    def whole(self) -> Tensor:
        """Return the scores."""
        tensor = _tensor(self._source, self._each)
        self._see(self._each)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            return self._prune.score(tensor, self._each.name)

    def source(self) -> Source:
        """Return them as what is ranked."""
        info = self._source.infos[self._each.parts[0]]
        if self._prune.score is not magnitude:
            return Source(
                info.numel, torch.float32, self._split, lambda at: self.whole().flatten()[at]
            )
        like = torch.empty(0, dtype=info.dtype)
        like = like if len(self._each.parts) == 1 else joined(like, like)
        return Source(info.numel, magnitude(like).dtype, self._magnitudes, self._magnitudes_at)

    def _split(self) -> Iterator[Tensor]:
        scores = self.whole().flatten()
        check_ranked(scores)
        yield from scores.split(chunk_size(scores))

    def _magnitudes(self) -> Iterator[Tensor]:
        """Yield the magnitudes of one piece after the other, while it is in the cache."""
        tensor = _tensor(self._source, self._each).flatten()
        self._see(self._each)
        real = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        scratch = Scratch()
        for chunk in tensor.split(chunk_size(tensor)):
            scores = torch.abs(chunk, out=scratch.like(chunk)) if real else magnitude(chunk)
            if not self._is_checked:
                check_ranked(scores)
            yield scores
        self._is_checked = True

    def _magnitudes_at(self, places: Tensor) -> Tensor:
        return magnitude(_tensor(self._source, self._each).flatten()[places])


def _tensor(source: Checkpoint, each: Reached) -> Tensor:
    parts = [source.read(name) for name in each.parts]
    return parts[0] if len(parts) == 1 else joined(*parts)


def _check_plain(source: Checkpoint, rules: list[Rule]) -> None:
    """Raise CheckpointError if a rule prunes what only a model can compute."""
    for name, keys in computed(source).items():
        rule = next((r for r in rules if any(_is_in(key, r.target) for key in (name, *keys))), None)
        if rule is not None and rule.prune is not None:
            raise CheckpointError(
                f'a pruned tensor must be plain; "{name}" is masked or parametrized. Fold masks '
                f"with `parasparse squash` first, or put --rule '{name}=none' before its rule."
            )


def _is_in(name: str, glob: str) -> bool:
    """Whether `glob` matches `name` or a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), glob) for end in range(1, len(parts) + 1))


def _is_idle(rule: Rule, source: Checkpoint) -> bool:
    """Whether a rule leaves alone what could not be pruned anyhow: vectors, computed tensors."""
    if rule.prune is not None or rule.target in source.infos:
        return False
    left = computed(source)
    inside = {key for keys in left.values() for key in keys}
    found = [name for name in source.infos if name not in inside and _is_in(name, rule.target)]
    dims = [len(source.infos[name].shape) for name in found]
    return bool(dims or any(_is_in(n, rule.target) for n in left)) and max(dims, default=0) < 2


def _reached(target: Target, names: dict[tuple[int, str], str], rule: Rule) -> Reached:
    parts = tuple(names[id(part[0].module), part[0].attr] for part in target.parts)
    return Reached(target.name, parts, rule)


def _model_of(source: Checkpoint) -> tuple[nn.Module, dict[tuple[int, str], str]]:
    """Return modules on the meta device that hold what `source` does; place -> its name there."""
    model = _Place()
    modules: dict[str, nn.Module] = {"": model}
    held: dict[str, Tensor] = {}
    names: dict[tuple[int, str], str] = {}
    left = {key for keys in computed(source).values() for key in keys}  # see `_check_plain`
    for name, info in source.infos.items():
        path, _, attr = name.rpartition(".")
        if name in left:
            continue
        if attr.startswith("_") and hasattr(model, attr):
            raise CheckpointError(f'a tensor must not be called as a Module\'s own; "{name}" is.')
        kind: type[nn.Module] = nn.ParameterDict if attr in ("real", "imag") else _Place
        module = _module_at(path, modules, kind)
        first = source.same.get(name, name)
        if first not in held:
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            number = info.dtype.is_floating_point or info.dtype.is_complex
            held[first] = nn.Parameter(tensor) if number else tensor
        if isinstance(held[first], nn.Parameter):
            module._parameters[attr] = held[first]  # type: ignore[assignment]
        else:
            module._buffers[attr] = held[first]
        names[id(module), attr] = first
    return model, names


class _Place(nn.Module):
    """Holds tensors of any name: those of methods, too."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            held = object.__getattribute__(self, "__dict__")
            for kind in ("_parameters", "_buffers"):
                if name in held.get(kind, ()):
                    return held[kind][name]
        return super().__getattribute__(name)


def _module_at(path: str, modules: dict[str, nn.Module], make: type[nn.Module]) -> nn.Module:
    """Return the module at `path`, made where there is none."""
    if path not in modules:
        above, _, own = path.rpartition(".")
        modules[path] = make()
        _module_at(above, modules, _Place)._modules[own] = modules[path]
    return modules[path]
