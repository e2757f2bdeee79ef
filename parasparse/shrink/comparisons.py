"""Comparisons of sizes, which may decide what a program does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from parasparse.shrink.expressions import (
    Attribute,
    Expression,
    Requirement,
    Span,
    attributes_in,
    evaluate,
    spans_in,
)


@dataclass(frozen=True)
class Comparison:
    """A comparison of sizes, which may decide what the program does.

    Attributes:
        given: the comparison.
        outcome: its result, which must stay.
        where: the module, for messages.
    """

    given: Expression
    outcome: bool
    where: str


def turned(
    compared: list[Comparison],
    requirements: list[Requirement],
    new: Mapping[Attribute, int],
    values: Mapping[Attribute, int],
    kept: Tensor,
) -> Iterator[tuple[Comparison, list[Span]]]:
    """Yield the comparisons that get another result, and the dimensions that this depends on.

    Args:
        compared: the comparisons.
        requirements: from which the `new` values come.
        new: the attributes that change.
        values: the attributes as they are.
        kept: whether each id is kept.
    """
    now = {**values, **new}
    for each in compared:
        if evaluate(each.given, now, kept) != each.outcome:
            yield each, spans_behind(each.given, requirements, new)


def spans_behind(
    given: Expression, requirements: list[Requirement], new: Mapping[Attribute, int]
) -> list[Span]:
    """Return the dimensions that decide an expression, by the `new` values of attributes too."""
    attributes = set(attributes_in(given)) & new.keys()
    follow = (r.span for r in requirements if attributes & set(attributes_in(r.given)))
    return [*spans_in(given), *follow]
