"""Which tensors the left side of a rule reaches, and which rule gets them."""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from parasparse.targets.tensors import Target, masked_tensors_of
from parasparse.targets.weights import is_companion, why_dense
from parasparse.text import described, listed, nearest

Predicate = Callable[[str, nn.Module, Tensor], bool]
# The left side of a rule, and one or several left sides.
Spec: TypeAlias = str | re.Pattern[str] | type | tuple[type, ...] | Predicate
Specs: TypeAlias = Spec | list[Any] | tuple[Any, ...] | set[Any]


def masked_targets(model: nn.Module, specs: Specs | None = None) -> list[Target]:
    """Return the masked tensors of `model` that `specs` reach, or all; see `masked_tensors_of`."""
    found = [target for target in masked_tensors_of(model) if target.masks()]
    return found if specs is None else reached(specs, found, "a masked tensor")


def reached(specs: Specs, targets: list[Target], what: str) -> list[Target]:
    """Return the targets that `specs` reach; raise ValueError if one of `specs` reaches none."""
    wanted: set[int] = set()
    for spec in as_list(specs):
        found = {id(target) for target in targets if reaches(spec, target)}
        if not found:
            raise ValueError(_misses(spec, targets, f"`targets` must each reach {what}"))
        wanted |= found
    return [target for target in targets if id(target) in wanted]


def as_list(specs: Specs) -> list[Spec]:
    """Return one or several left sides of rules as a list."""
    several = isinstance(specs, (list, tuple, set)) and not _is_types(specs)
    return list(specs) if several else [specs]  # type: ignore[arg-type, list-item]


def reached_alone(targets: list[Target]) -> list[Target]:
    """Return the targets that a sparsity alone, without a left side, reaches."""
    dense = why_dense(targets)
    return [target for target in targets if target not in dense]


def reaches(spec: Spec, target: Target) -> bool:
    """Whether `spec`, the left side of a rule, reaches `target`."""
    if isinstance(spec, str):
        if spec in target.names or (_is_matrix(target) and spec in target.paths):
            return True
        is_glob = any(c in spec for c in "*?[")
        return is_glob and _is_matrix(target) and any(fnmatchcase(p, spec) for p in target.paths)
    if isinstance(spec, re.Pattern):
        return _is_matrix(target) and any(spec.fullmatch(name) for name in target.names)
    if _is_types(spec):
        owners = [owner for _, owner in target.owners]
        return _is_matrix(target) and any(isinstance(owner, spec) for owner in owners)  # type: ignore[arg-type]
    if not callable(spec) or isinstance(spec, nn.Module):
        raise TypeError(
            "a rule's target must be a name or glob, a compiled regex, a module type or tuple of "
            f"types, or a predicate (name, module, tensor) -> bool; got {spec!r:.60}."
        )
    if target.is_buffer:
        return False
    tensor = target.stored()
    return any(spec(name, owner, tensor) for name, owner in target.owners)


def group_by_rule(
    specs: Mapping[int, Spec | None], targets: list[Target]
) -> dict[int, list[Target]]:
    """Return the targets of each rule by number. The first rule that reaches a target gets it.

    In `specs`, None stands for a sparsity alone.

    Raises:
        ValueError: a rule reaches no target, or only targets of earlier rules.
    """
    taken: dict[int, int] = {}  # target -> rule
    groups: dict[int, list[Target]] = {}
    for number, spec in specs.items():
        if spec is None:
            reached = reached_alone(targets)
        else:
            reached = [target for target in targets if reaches(spec, target)]
        if not reached:
            raise ValueError(_misses(spec, targets, "`rules` must each reach a tensor"))
        groups[number] = [t for t in reached if id(t) not in taken]
        if not groups[number]:
            earlier = listed(dict.fromkeys(described(specs[taken[id(t)]]) for t in reached))
            raise ValueError(
                "`rules` must each reach a tensor that no earlier rule reaches; "
                f'all that "{described(spec)}" reaches was taken by {earlier}. Put the narrower '
                "rule first."
            )
        taken |= {id(t): number for t in groups[number]}
    return groups


def _misses(spec: Spec | None, targets: list[Target], must: str) -> str:
    near = ""
    if isinstance(spec, str):
        names = [name for target in targets for name in target.names]
        modules = [path for t in targets for path in t.paths if path not in t.names]
        ending = re.search(r"\.?[*?\[].*", spec)
        globs = [module + ending[0] for module in modules] if ending else []
        globs = [glob for glob in globs if any(reaches(glob, target) for target in targets)]
        near = nearest(spec, dict.fromkeys([*globs, *modules, *names]))
        near = near or (f" (there are: {listed(names, most=4)})" if names else "")
    if spec is None:
        dense = [f"{t.name} ({reason})" for t, reason in why_dense(targets).items()]
        near = f", which it leaves dense: {listed(dense, most=4)}" if dense else ""
    what = "a sparsity alone" if spec is None else f'"{described(spec)}"'
    return (
        f"{must}; {what} reaches none of {len(targets)} tensors{near}. Globs, regexes and types "
        "reach parameters with two or more dimensions. Use the exact name for a buffer, for a "
        "parameter with fewer dimensions, or for the scale of a weight."
    )


def _is_matrix(target: Target) -> bool:
    """Whether globs, regexes and types can reach `target`."""
    return not target.is_buffer and len(target.shape) >= 2 and not is_companion(target)


def _is_types(spec: object) -> bool:
    types = spec if isinstance(spec, tuple) and spec else (spec,)
    return all(isinstance(t, type) for t in types)
