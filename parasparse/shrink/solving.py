"""Finds new values of attributes from the sizes that the smaller network needs."""

from __future__ import annotations

from torch import Tensor

from parasparse.shrink.expressions import (
    Attribute,
    Expression,
    Requirement,
    attributes_in,
    evaluate,
)


def solve(
    requirements: list[Requirement],
    values: dict[Attribute, int],
    kept: Tensor,
) -> tuple[dict[Attribute, int], list[Requirement]]:
    """Return new values of attributes, and the requirements that no values meet.

    Requirements of one attribute alone come first; each later one may change one attribute more.

    Args:
        requirements: what must hold.
        values: the attributes as they are.
        kept: whether each id is kept.
    """
    new, decided = dict(values), set[Attribute]()
    unmet: list[Requirement] = []
    for requirement in sorted(requirements, key=lambda r: len(set(attributes_in(r.given)))):
        wanted = requirement.span.size(kept)
        if wanted is None:
            unmet.append(requirement)
            continue
        found = attributes_in(requirement.given)
        for attribute in [None, *(a for a in dict.fromkeys(found) if a not in decided)]:
            value = _solved(requirement.given, attribute, wanted, new, kept)
            if value is not None:
                if attribute is not None:
                    new[attribute] = value
                break
        if evaluate(requirement.given, new, kept) != wanted:
            unmet.append(requirement)
        else:
            decided |= set(found)
    changed = zip(new.items(), values.values(), strict=True)
    return {attribute: v for (attribute, v), old in changed if v != old}, unmet


def _solved(
    given: Expression, attribute: Attribute | None, wanted: int, values: dict[Attribute, int],
    kept: Tensor,
) -> int | None:  # fmt: skip
    """Return the value of `attribute` with which `given` is `wanted`, or None."""
    if attribute is None:
        return 0 if evaluate(given, values, kept) == wanted else None
    if given == attribute:
        return wanted
    tried = dict(values)
    for value in range(values[attribute], 0, -1):
        tried[attribute] = value
        if evaluate(given, tried, kept) == wanted:
            return value
    return None
