"""Rules and a model in; what each tensor gets, checked, out. Changes nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.attach.older_hooks import legacy_hook, pruned_names
from parasparse.attach.stand_in import check_not_accelerated
from parasparse.masks.convert import as_mask
from parasparse.masks.mask import Mask
from parasparse.masks.soft_mask import SoftMask
from parasparse.patterns import unstructured
from parasparse.rules.prune import Prune
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
        rule: the left side of its rule; None for a treatment alone.
        treatment: the right side as the user wrote it.
        result: a mask, a module that masks, or None for a mask that is not set.
        reuse: the Mask that it has already, to be set again.
    """

    target: Target
    rule: Spec | None
    treatment: Any
    result: Tensor | nn.Module | None
    reuse: Mask | None


def _treatment(spec: Spec | None, treatment: Any) -> Any:
    try:
        return as_treatment(treatment)
    except (TypeError, ValueError) as error:
        if spec is not None:
            error.add_note(f'in the rule for "{described(spec)}"')
        raise


def assignments(model: nn.Module, rules: Rules, *, pairs: bool) -> list[Assignment]:
    """Return an assignment for each tensor of `model` that `rules` change.

    Raises:
        TypeError, ValueError, RuntimeError: the rules cannot be followed; see `sparsify`.
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
    assigned = []
    for number, group in groups.items():
        treatment = treatments[number]
        if treatment is None:
            continue
        for target in group:
            _check_target(target)
        with same_draws(model):
            results = _results(treatment, group)
        for target in group:
            result = _checked(target, results[target.name], treatment, sharded=sharded)
            own = [m for m in target.masks() if isinstance(m, Mask) and users[id(m)] == 1]
            assigned.append(Assignment(target, *numbered[number], result, own[0] if own else None))
    return assigned


def as_pairs(rules: Rules) -> list[tuple[Spec | None, Any]]:
    """Return `rules` as (target, treatment); the target of a treatment alone is None."""
    if is_array(rules) and not _are_pairs(rules):
        raise TypeError(
            "`rules` must be {target: treatment}, pairs of these, or a treatment alone; got "
            f'{rules!r:.60}. A mask needs the name of its tensor: {{"weight": mask}}.'
        )
    if isinstance(rules, (Mapping, list, tuple)):
        pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
        if any(spec is None for spec, _ in pairs):
            raise TypeError("a rule's target must not be None; write the treatment alone.")
    else:
        pairs = [] if rules is None else [(None, rules)]
    if not pairs:
        raise ValueError(f"`rules` must hold at least one rule; got {rules!r}.")
    return pairs


def _are_pairs(rules: Rules) -> bool:
    return isinstance(rules, (list, tuple)) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in rules
    )


def _check_target(target: Target) -> None:
    dtype = target.stored().dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(
            f'a masked tensor must be real or complex floating point; "{target.name}" is {dtype}. '
            "Leave it out of your rules, or put a rule to None before this one."
        )
    for site in target.sites:
        hook = legacy_hook(site.module, site.attr)
        if hook is not None:
            raise ValueError(
                f'a masked tensor must be plain or parametrized; "{target.name}" is computed by a '
                f"hook of torch.nn.utils.{hook}. Remove that, and use "
                f"torch.nn.utils.parametrizations.{hook}."
            )
        if isinstance(site.module, torch.jit.ScriptModule):
            raise TypeError(
                f'`model` must consist of Python modules; "{target.name}" belongs to a '
                "ScriptModule. Sparsify before scripting, and squash before that."
            )
        if not isinstance(
            site.module._modules.get("parametrizations", nn.ModuleDict()), nn.ModuleDict
        ):
            raise ValueError(
                f'`model` must leave the name "parametrizations" to torch; the module that holds '
                f'"{target.name}" has a submodule of its own there. Rename it.'
            )
    if len(target.sites) > len(target.components) and any(
        site.attr in pruned_names(site.module) for site in target.sites
    ):
        raise ValueError(
            f"a tied tensor must not be pruned by torch.nn.utils.prune at one of its places; "
            f'"{target.name}" is. Call torch.nn.utils.prune.remove on it first.'
        )


def _results(treatment: Treatment, group: list[Target]) -> dict[str, Any]:
    # What is 0 now is what the module sees; scores rank what is stored.
    now = treatment is keep_nonzero
    tensors = {t.name: t.effective() if now else t.stored() for t in group}
    if not (now or isinstance(treatment, Prune | Fixed)):  # these know parts
        tensors = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            results = treatment(tensors)
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
            f"a treatment must return a module for each tensor of its own, {listed(tensors)}; it "
            "returned one for several."
        )
    return dict(results)


def _checked(
    target: Target, result: Any, treatment: Treatment, *, sharded: bool
) -> Tensor | nn.Module | None:
    """Return `result` as what it stands for, if `target` can have it."""
    masks = target.masks()
    soft = any(not isinstance(mask, Mask) for mask in masks)
    if masks and (soft or isinstance(result, nn.Module)):
        what = "a mask" if soft else type(result).__name__
        raise ValueError(
            f'{what} must go on a tensor without a soft or other mask; "{target.name}" has '
            f"{', '.join(type(mask).__name__ for mask in masks)}. `binarize`, `squash` or "
            "`unsparsify` it first."
        )
    if result is None:
        return None
    if isinstance(result, nn.Module):
        if is_dtensor(target.stored()):
            raise RuntimeError(
                f"{type(result).__name__} must be attached before weights are sharded; "
                f'"{target.name}" is. Call `sparsify` before `fully_shard` or `parallelize_module`.'
            )
        if target.is_pair and isinstance(result, SoftMask):
            # It was made like the complex tensor, which is wider than parts of half precision.
            result.to(target.firsts[0].stored().dtype)
        _check_module(target, result)
        return result
    try:
        tensor = target.stored()
        mask = as_mask(result, tensor.shape, tensor.dtype)
        if not (isinstance(treatment, Prune) and treatment.pattern is unstructured):
            mask = mask.clone()  # may be the live mask of another that gets a new one before this
        held = next((m.mask for m in masks if isinstance(m, Mask)), None)
        if held is not None:
            return laid_out_like(mask, held)
        # Weights that `fully_shard` shards are whole where they are masked.
        return full_tensor(mask) if sharded else laid_out_like(mask, tensor)
    except (RuntimeError, TypeError, ValueError) as error:
        error.add_note(f'for the mask of "{target.name}"')
        raise


def _check_module(target: Target, module: nn.Module) -> None:
    tensor = target.stored()
    if target.is_pair and not isinstance(module, SoftMask):  # it sees each part alone
        tensor = tensor.real
    with torch.no_grad():
        out = module(tensor)
    if not isinstance(out, Tensor) or (out.shape, out.dtype) != (tensor.shape, tensor.dtype):
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f'a module that masks "{target.name}" must return a tensor like it, {tensor.dtype} '
            f"{tuple(tensor.shape)}; {type(module).__name__} returns {got}."
        )
