"""`plan`: preview `sparsify`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from parasparse.rules.assignments import assignments
from parasparse.rules.types import Rules
from parasparse.sharding.dtensors import count_nonzero
from parasparse.targets.left_dense import DenseRow, dense_rows
from parasparse.text import as_text, described, noted


@dataclass(frozen=True)
class PlanRow:
    """What `sparsify` would do to one tensor.

    Attributes:
        name: plain name of the tensor.
        shape: its shape.
        rule: the target of its rule; "every weight" for a treatment alone.
        treatment: the treatment of its rule.
        kept: number of entries that the mask keeps, in both components of a pair; None if unknown
            (an unset or learned mask, or a tensor on the meta device).
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    treatment: str
    kept: int | None


class Plan(tuple[PlanRow, ...]):
    """The rows of `plan`, printed as a table.

    Attributes:
        dense: the large tensors that no rule reaches, and why.
    """

    dense: tuple[DenseRow, ...] = ()

    def __repr__(self) -> str:
        rows = [
            (r.name, r.shape, r.rule, r.treatment, "?" if r.kept is None else f"{r.kept:,}")
            for r in self
        ]
        return as_text(("name", "shape", "rule", "treatment", "kept"), rows) + noted(self.dense)


def plan(model: nn.Module, rules: Rules, *, pairs: bool = True) -> Plan:
    """Return a table of what `sparsify(model, rules)` would do, and change nothing.

    See `sparsify` for the arguments and errors.

    Examples:
        >>> plan(nn.Linear(10, 10), 0.9)[0].kept
        10
    """
    rows, assigned = [], assignments(model, rules, pairs=pairs)
    for each in assigned:
        target, kept = each.target, None
        if isinstance(each.result, Tensor) and not each.result.is_meta:
            kept = count_nonzero(each.result) * len(target.components)
        rule = "every weight" if each.rule is None else described(each.rule)
        shape = tuple(target.stored().shape)
        rows.append(PlanRow(target.name, shape, rule, described(each.treatment), kept))
    result = Plan(rows)
    result.dense = dense_rows(assigned.targets, {row.name for row in rows})
    return result
