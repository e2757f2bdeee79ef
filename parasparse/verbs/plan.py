"""`plan`: what `sparsify` would do, without doing it."""

from dataclasses import dataclass

from torch import Tensor, nn

from parasparse.rules.assignments import assignments
from parasparse.rules.types import Rules
from parasparse.sharding.dtensors import count_nonzero
from parasparse.text import as_text, described


@dataclass(frozen=True)
class PlanRow:
    """What `sparsify` would do to one tensor.

    Attributes:
        name: plain name of the tensor.
        shape: its shape.
        rule: the left side of the rule that has it; "every weight" for a treatment alone.
        treatment: the right side.
        kept: entries that the mask keeps, of both tensors of a pair; None where that is not known:
            an unset or learned mask, or a tensor on the meta device.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    treatment: str
    kept: int | None


class Plan(tuple[PlanRow, ...]):
    """The rows of `plan`; prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        rows = [
            (r.name, r.shape, r.rule, r.treatment, "?" if r.kept is None else f"{r.kept:,}")
            for r in self
        ]
        return as_text(("name", "shape", "rule", "treatment", "kept"), rows)


def plan(model: nn.Module, rules: Rules, *, pairs: bool = True) -> Plan:
    """Return the table of what `sparsify(model, rules)` would do; change nothing.

    Args, Raises: as `sparsify`.

    Examples:
        >>> plan(nn.Linear(10, 10), 0.9)[0].kept
        10
    """
    rows = []
    for each in assignments(model, rules, pairs=pairs):
        known = isinstance(each.result, Tensor) and not each.result.is_meta
        kept = count_nonzero(each.result) if known else None  # type: ignore[arg-type]
        rows.append(
            PlanRow(
                name=each.target.name,
                shape=tuple(each.target.stored().shape),
                rule="every weight" if each.rule is None else described(each.rule),
                treatment=described(each.treatment),
                kept=None if kept is None else kept * len(each.target.components),
            )
        )
    return Plan(rows)
