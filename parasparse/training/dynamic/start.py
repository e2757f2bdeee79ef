"""The start of dynamic sparse training: the first masks, and checks of the moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from parasparse.attach.stack import stack_of
from parasparse.distributions import erdos_renyi, erk
from parasparse.masks.convert import as_mask
from parasparse.masks.mask import Mask
from parasparse.optim import Optimizers, keeps_momentum, kind_of
from parasparse.patterns import Pattern, n_of_m, unstructured
from parasparse.patterns.blocks_channels_heads import has_units
from parasparse.rules.assignments import Assignment, Assignments, as_pairs, assignments
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment, is_array, keep_nonzero
from parasparse.rules.types import Rules
from parasparse.scores.weights_alone import random
from parasparse.sharding.dtensors import count_nonzero, full_tensor
from parasparse.targets.reach import group_by_rule
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import described, listed
from parasparse.training.dynamic.compact_layer import MOVES, CompactLayer
from parasparse.training.dynamic.layer import Layer
from parasparse.training.dynamic.moves import GROWTH_SCORES, no_redistribution
from parasparse.training.dynamic.update import Moves
from parasparse.training.dynamic.view import needs_of
from parasparse.training.scaled_rules import as_rules

_DRAWN: dict[str, dict[str, Any]] = {
    "constant": {}, "linear": {"distribution": erdos_renyi}, "erk": {"distribution": erk},
}  # fmt: skip
Init = str | Mapping[str, Any]


def first_masks(
    model: nn.Module, rules: Rules, init: Init
) -> tuple[Assignments, list[Layer | CompactLayer]]:
    """Return the assignments of the first masks and their layers, without changing `model`.

    `init` and errors are those of `DynamicSparsity`.
    """
    pairs = as_pairs(rules)
    start = _start(init)
    wanted = [(spec, None if rule is None else start(rule)) for spec, rule in pairs]
    targets = tensors_of(model)
    groups = group_by_rule({n: spec for n, (spec, _) in enumerate(pairs)}, targets)
    if init != "resume":
        reached = [t for n, group in groups.items() if pairs[n][1] is not None for t in group]
        _check_not_compact(reached)
    assigned = assignments(model, as_rules(wanted), pairs=True, compact=True)
    patterns = {t.name: _pattern(pairs[n][1], t.name) for n, group in groups.items() for t in group}
    layers = [_layer(each.target, patterns[each.target.name]) for each in assigned]
    names = [each.target.name for each in assigned]
    unknown = [name for name in init if name not in names] if isinstance(init, Mapping) else []
    if unknown:
        raise ValueError(
            f"`init` must name tensors that `rules` mask; {listed(unknown)} are not among "
            f"{listed(names)}."
        )
    if not assigned:
        raise ValueError("`rules` must give at least one tensor a mask; all of them are None.")
    for each, layer in zip(assigned, layers, strict=True):
        _check_kept(each, layer) if isinstance(layer, CompactLayer) else _check(each, layer)
        if init == "resume" and any(_is_real(mask) for mask in each.target.masks()):
            raise ValueError(
                f'`init="resume"` needs bool masks; the mask of "{each.target.name}" is '
                "real-valued. `binarize` the model first."
            )
    return assigned, layers


def check_moves(
    moves: Moves, layers: Mapping[str, Layer | CompactLayer], optimizer: Optimizers
) -> None:
    """Raise ValueError if `moves` do not suit these layers or this optimizer."""
    compact = [name for name, layer in layers.items() if isinstance(layer, CompactLayer)]
    if compact:
        _check_moves_of_compact(moves, compact)
    bound = {name: layer for name, layer in layers.items() if layer.pattern is not unstructured}
    if bound and (moves.redistribution is not no_redistribution or moves.grow_globally):
        raise ValueError(
            'with patterns, use `redistribution="none"` and growth per layer, because units differ '
            f"in size between layers; {listed(bound)} have a pattern."
        )
    blind = [n for n, layer in layers.items() if layer.seen_weight() is not layer.parameters[0]]
    if blind and "state" in moves.needs:
        raise ValueError(
            "a move that reads the optimizer's state must get the Parameter itself, which it does "
            f"not for pairs and patterns of units: {listed(blind)}. If it reads only the weights, "
            'decorate it with `@ps.moves.needs("weights")`.'
        )
    groups = [name for name, layer in bound.items() if not has_units(layer.pattern)]
    if groups and moves.growth not in GROWTH_SCORES:
        raise ValueError(
            '`growth` must be "random", "momentum" or "gradient" with the pattern `n_of_m`, which '
            f"{listed(groups)} have."
        )
    without = [
        name
        for name, layer in layers.items()
        if not all(keeps_momentum(optimizer, parameter) for parameter in layer.parameters)
    ]
    if without and "momentum" in moves.needs:
        raise ValueError(
            f"`optimizer` must keep momentum, which the moves read; {kind_of(optimizer)} "
            f'keeps none for {listed(without)}. Set `momentum=0.9`, or use "gradient" or "random" '
            'growth and "magnitude", "nonzero" or "none" redistribution.'
        )


def _check_moves_of_compact(moves: Moves, names: list[str]) -> None:
    for kind, known in MOVES.items():
        move = getattr(moves, kind)
        if move in known.values():
            continue
        if needs_of(move).isdisjoint({"momentum", "state"}):
            why = "may read masks and weights of the dense shape"
        else:
            why = "may read the optimizer's state of entries that are not kept"
        raise ValueError(
            f"`{kind}` must be one of {listed(known)} for compact weights; "
            f"{getattr(move, '__name__', move)} {why}, which does not exist for {listed(names)}. "
            "Choose one of these, or call parasparse.expand(model) first."
        )


def _check_not_compact(targets: list[Target]) -> None:
    names = [target.name for target in targets if target.is_compact]
    if names:
        raise ValueError(
            f'`init` must be "resume" for compact weights, which keep the entries that they have; '
            f"{listed(names)} are compact. Draw the first masks with `sparsify`, before `compact`."
        )


def _layer(target: Target, pattern: Pattern) -> Layer | CompactLayer:
    if not target.is_compact:
        return Layer(target, pattern)
    if pattern is not unstructured:
        raise ValueError(
            f'the entries of a compact weight move one by one; "{target.name}" has the pattern '
            f"{pattern} in its rule. Leave it out, or call parasparse.expand(model) first."
        )
    return CompactLayer(target)


def _check_kept(each: Assignment, layer: CompactLayer) -> None:
    if not len(layer.mask):
        raise ValueError(
            f'each tensor must have at least one connection; "{each.target.name}", '
            f"{tuple(each.target.shape)}, has none."
        )


def _start(init: Init) -> Callable[[Any], Any]:
    """Return the function from a treatment in the rules to the one that makes the first mask."""
    if isinstance(init, Mapping):
        masks = dict(init)
        return lambda rule: partial(_given, masks)
    if init == "resume":
        return lambda rule: keep_nonzero
    if not isinstance(init, str) or init not in _DRAWN:
        raise ValueError(
            f"`init` must be one of {listed([*_DRAWN, 'resume'])}, or masks by name; got {init!r}."
        )
    return lambda rule: _drawn(rule, _DRAWN[init])


def _drawn(rule: Any, keywords: dict[str, Any]) -> Any:
    treatment = as_treatment(rule)
    if rule is treatment or is_array(rule) or not isinstance(treatment, Prune):
        return rule  # makes its own masks
    return Prune(treatment.sparsity, score=random, **keywords)


def _given(masks: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    missing = [name for name in tensors if name not in masks]
    if missing:
        raise ValueError(f"`init` must have a mask for each tensor; {listed(missing)} have none.")
    return {name: masks[name] for name in tensors}


def _pattern(rule: Any, name: str) -> Pattern:
    pattern = rule.pattern if isinstance(rule, Prune) else unstructured
    if pattern is unstructured or has_units(pattern) or isinstance(pattern, n_of_m):
        return pattern
    raise ValueError(
        "dynamic sparse training needs a pattern that is unstructured, of units, or n_of_m; "
        f'"{name}" has {described(pattern)}.'
    )


def _check(each: Assignment, layer: Layer) -> None:
    name = each.target.name
    if not isinstance(each.result, Tensor) or each.result.dtype.is_floating_point:
        raise ValueError(
            f'`rules` must give each tensor a bool mask that is set; "{name}" has the treatment '
            f"{described(each.treatment)}."
        )
    if _is_parametrized(each.target):
        raise ValueError(
            f'dynamic sparse training cannot mask parametrized tensors, such as "{name}". Remove '
            "the parametrization, or exclude the tensor with a `None` rule placed before this rule."
        )
    shape = each.target.stored().shape
    mask = as_mask(each.result, shape, each.target.stored().dtype)
    if not count_nonzero(mask):
        raise ValueError(
            f'`rules` must leave each tensor at least one connection; "{name}", {tuple(shape)}, '
            "would have none. Lower its sparsity."
        )
    pattern = layer.pattern
    mask = mask if pattern is unstructured else full_tensor(mask)
    held = pattern(mask.float()) if isinstance(pattern, n_of_m) else mask
    if has_units(pattern):
        held = pattern.spread(pattern.pool(mask.float()) > 0, shape)
    if not held.equal(mask):
        raise ValueError(
            f'the mask of "{name}" in `init` must follow the pattern of its rule, {pattern}.'
        )


def _is_real(mask: nn.Module) -> bool:
    return isinstance(mask, Mask) and mask.mask is not None and mask.mask.is_floating_point()


def _is_parametrized(target: Target) -> bool:
    stacks = [stack_of(site.module, site.attr) for site in target.sites]
    masked = bool(target.masks())
    return any(stack is not None and len(stack) > masked for stack in stacks)
