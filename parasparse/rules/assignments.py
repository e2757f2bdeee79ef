"""Assign masks to the tensors of a model by rules; check everything, change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from parasparse import names
from parasparse.attach.accelerated import check_not_accelerated
from parasparse.masks.convert import as_mask
from parasparse.masks.kept_entries import KeptEntries
from parasparse.masks.mask import Mask
from parasparse.masks.new_weights import NewWeights
from parasparse.masks.soft_mask import SoftMask
from parasparse.patterns import chain, n_of_m, unstructured
from parasparse.rules.maskable import check_maskable
from parasparse.rules.prune import Prune
from parasparse.rules.prune_kept import results_of_kept
from parasparse.rules.rewriting import check_can_be_written
from parasparse.rules.treatments import Fixed, as_treatment, is_array, keep_nonzero
from parasparse.rules.types import Rules, Treatment
from parasparse.sharding.dtensors import full_tensor, is_dtensor, laid_out_like
from parasparse.sharding.fsdp import is_sharded, reshard
from parasparse.sharding.same_draws import same_draws
from parasparse.targets.reach import Spec, group_by_rule
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import described, listed


@dataclass(frozen=True, eq=False)
class Assignment:
    """What one tensor gets.

    Attributes:
        target: the tensor.
        rule: the target of its rule, as the user wrote it; None for a treatment alone.
        treatment: the treatment of its rule, as the user wrote it.
        result: a mask, a module that masks, or None for a mask that is not set; for a compact
            weight, its kept entries.
        reuse: the tensor's present Mask, to be set again; None: a new one.
        weights: new values of the stored tensor; None: they stay.
    """

    target: Target
    rule: Spec | None
    treatment: Any
    result: Tensor | nn.Module | KeptEntries | None
    reuse: Mask | None
    weights: Tensor | None = None


class Assignments(list[Assignment]):
    """The assignments of a model.

    Attributes:
        targets: all tensors of the model.
    """

    targets: list[Target]


def _treatment(spec: Spec | None, treatment: Any) -> Any:
    try:
        return as_treatment(treatment)
    except (TypeError, ValueError) as error:
        if spec is not None:
            error.add_note(f'in the rule for "{described(spec)}"')
        raise


def assignments(
    model: nn.Module, rules: Rules, *, pairs: bool, compact: bool = False
) -> Assignments:
    """Return an assignment for each tensor of `model` that `rules` change; raise as `sparsify`.

    Compact weights are refused unless `compact`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    check_not_accelerated(model)
    numbered = dict(enumerate(as_pairs(rules)))
    treatments = {n: _treatment(*rule) for n, rule in numbered.items()}
    targets = tensors_of(model, pairs=pairs)
    groups = group_by_rule({n: spec for n, (spec, _) in numbered.items()}, targets)
    users = Counter(id(mask) for target in targets for mask in target.masks())
    sharded = is_sharded(model)
    reshard(model)
    assigned = Assignments()
    assigned.targets = targets
    for number, group in groups.items():
        treatment = treatments[number]
        if treatment is None:
            continue
        for target in group:
            check_maskable(target, compact=compact)
        _check_dim(treatment, group)
        with same_draws(model):
            results = _results(treatment, group)
        for target in group:
            result: Any = results[target.name]
            weights = None
            if isinstance(result, NewWeights):
                check_can_be_written(target, result.weights)
                result, weights = result.mask, result.weights
            result = _checked(target, result, treatment, sharded=sharded)
            own = [m for m in target.masks() if isinstance(m, Mask) and users[id(m)] == 1]
            reuse = own[0] if own else None
            assigned.append(Assignment(target, *numbered[number], result, reuse, weights))
    return assigned


def as_pairs(rules: Rules) -> list[tuple[Spec | None, Any]]:
    """Return `rules` as (target, treatment); the target of a treatment alone is None."""
    are_pairs = isinstance(rules, (list, tuple)) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in rules
    )
    if is_array(rules) and not are_pairs:
        raise TypeError(
            "`rules` must be {target: treatment}, a list of such pairs, or a single treatment; got "
            f'{rules!r:.60}. A mask needs the name of its tensor: {{"weight": mask}}.'
        )
    if isinstance(rules, (Mapping, list, tuple)):
        pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
        # A mapping has the names inside a module: {"conv": {"weight": mask}}, as of NNI.
        pairs = [each for pair in pairs for each in _flat(*pair)]
        if any(spec is None for spec, _ in pairs):
            raise TypeError("a rule's target must not be None. Pass the treatment alone.")
    else:
        pairs = [] if rules is None else [(None, rules)]
    if not pairs:
        raise ValueError(f"`rules` must contain at least one rule; got {rules!r}.")
    return pairs


def _flat(spec: Any, treatment: Any) -> list[tuple[Any, Any]]:
    nested = isinstance(spec, str) and isinstance(treatment, Mapping)
    return list(names.flat({spec: treatment}).items()) if nested else [(spec, treatment)]


def _check_dim(treatment: Any, group: list[Target]) -> None:
    """Raise ValueError if `n_of_m` does not know along which dimension a product sums."""
    pattern = getattr(treatment, "pattern", None)
    patterns = pattern.patterns if isinstance(pattern, chain) else (pattern,)
    if any(isinstance(each, n_of_m) and each.dim is None for each in patterns):
        for target in group:
            if len(target.shape) == 3 and not any(
                isinstance(s.module, _ConvNd) for s in target.sites
            ):
                raise ValueError(
                    f'"{target.name}" {tuple(target.shape)} is a stack of matrices, so `n_of_m` '
                    "needs the `dim` along which the product sums: -1 for F.linear(x, w[i]), -2 "
                    "for x @ w[i], 1 for a convolution (out, in, k)."
                )


def _results(treatment: Treatment, group: list[Target]) -> dict[str, Any]:
    """Return the results of `treatment` for `group`, by name."""
    if any(target.is_compact for target in group):
        with torch.no_grad():
            return results_of_kept(treatment, group)
    # "zeros" and `OneShot` read masked values; scores read stored ones.
    keeps = getattr(treatment, "keeps_masks", False)
    now = keeps or treatment is keep_nonzero
    tensors = {t.name: t.effective() if now else t.stored() for t in group}
    if not (now or isinstance(treatment, Prune | Fixed)):  # others may not know sharded tensors
        tensors = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            masks = ({t.name: t.mask() for t in group if t.masks()},) if keeps else ()
            results = treatment(tensors, *masks)
    except Exception as error:
        error.add_note(f"while applying {described(treatment)} to {listed(tensors)}")
        raise
    if not isinstance(results, Mapping) or results.keys() != tensors.keys():
        got = listed(results) if isinstance(results, Mapping) else type(results).__name__
        raise ValueError(
            f"a treatment must return a mask for each tensor of its group, {listed(tensors)}; "
            f"got {got}."
        )
    modules = [id(result) for result in results.values() if isinstance(result, nn.Module)]
    if len(set(modules)) < len(modules):
        raise ValueError(
            f"the treatment returned the same module for several of {listed(tensors)}. Return one "
            "module per tensor."
        )
    return dict(results)


def _checked(
    target: Target, result: Any, treatment: Treatment, *, sharded: bool
) -> Tensor | nn.Module | KeptEntries | None:
    """Return `result` as the mask or module for `target`, or raise an error if it does not fit."""
    if isinstance(result, KeptEntries):
        return result
    _check_replaceable(target, result)
    if result is None:
        return None
    if isinstance(result, nn.Module):
        return _checked_module(target, result)
    is_new = isinstance(treatment, Prune) and treatment.pattern is unstructured
    try:
        return _as_mask_of(target, result, is_new=is_new, sharded=sharded)
    except (RuntimeError, TypeError, ValueError) as error:
        error.add_note(f'for the mask of "{target.name}"')
        raise


def _check_replaceable(target: Target, result: Any) -> None:
    """Raise ValueError if `target` has a mask that `result` cannot replace."""
    masks = target.masks()
    soft = any(not isinstance(mask, Mask) for mask in masks)
    if masks and (soft or isinstance(result, nn.Module)):
        what = "a mask" if soft else type(result).__name__
        raise ValueError(
            f'{what} cannot be attached to "{target.name}", which already has a '
            f"{', '.join(type(mask).__name__ for mask in masks)}. Call `binarize`, `squash` or "
            "`unsparsify` first."
        )


def _as_mask_of(target: Target, result: Any, *, is_new: bool, sharded: bool) -> Tensor:
    """Return `result` as a mask laid out over processes as `target`; a copy unless it `is_new`."""
    tensor = target.stored()
    mask = as_mask(result, tensor.shape, tensor.dtype)
    if not is_new:
        mask = mask.clone()  # it may be another tensor's mask, which is replaced before this one
    held = next((m.mask for m in target.masks() if isinstance(m, Mask)), None)
    if held is not None:
        return laid_out_like(mask, held)
    # Weights that `fully_shard` shards are full where they are masked.
    return full_tensor(mask) if sharded else laid_out_like(mask, tensor)


def _checked_module(target: Target, module: nn.Module) -> nn.Module:
    """Return `module`, or raise an error if it cannot mask `target`."""
    tensor = target.stored()
    if is_dtensor(tensor):
        raise RuntimeError(
            f'{type(module).__name__} must be attached to "{target.name}" before weights are '
            "sharded. Call `sparsify` before `fully_shard` or `parallelize_module`."
        )
    if target.is_pair and isinstance(module, SoftMask):
        # The complex tensor it was made for has float32 components instead of half precision.
        module.to(target.firsts[0].stored().dtype)
    elif target.is_pair:  # other modules get each component separately
        tensor = tensor.real
    with torch.no_grad():
        out = module(tensor)
    if not isinstance(out, Tensor) or (out.shape, out.dtype) != (tensor.shape, tensor.dtype):
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f'a module that masks "{target.name}" must return {tensor.dtype} '
            f"{tuple(tensor.shape)}; {type(module).__name__} returns {got}."
        )
    return module
