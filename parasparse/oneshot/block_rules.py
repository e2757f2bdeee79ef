"""Which tensors of which block follow which rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from parasparse.oneshot.report import OneShotRow
from parasparse.oneshot.treatment import OneShot
from parasparse.patterns import Pattern
from parasparse.rules.assignments import as_pairs
from parasparse.rules.maskable import check_maskable
from parasparse.rules.prune import Prune
from parasparse.rules.treatments import as_treatment
from parasparse.rules.types import Rules
from parasparse.scores.statistics import Statistics
from parasparse.targets.reach import Spec, group_by_rule, reaches
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import listed


@dataclass(frozen=True)
class ByMagnitude:
    """Prune by magnitude; a tensor that has a mask keeps no other entries than this mask does."""

    sparsity: float | None
    pattern: Pattern
    keeps_masks: ClassVar[bool] = True

    def __call__(
        self, tensors: dict[str, Tensor], held: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Return the masks of `tensors`, which are 0 where the masks in `held` drop entries."""
        found = Prune(self.sparsity, pattern=self.pattern)(tensors)
        both = {name: (mask, held.get(name)) for name, mask in found.items()}
        return {name: new if old is None else new & old for name, (new, old) in both.items()}


@dataclass(frozen=True, eq=False)
class Group:
    """The tensors of one block that a rule reaches, and its treatment."""

    targets: list[Target]
    treatment: Any

    @property
    def needs_statistics(self) -> bool:
        """Whether the treatment has to be given statistics."""
        return getattr(self.treatment, "statistics", self) is None

    def rules(self, statistics: Statistics | None, rows: list[OneShotRow]) -> list[tuple[Any, Any]]:
        """Return rules for `sparsify`; tensors without statistics are pruned by magnitude.

        `rows` receives what `OneShot` reports.
        """
        if not self.needs_statistics or statistics is None:
            return [(_named(self.targets), self.treatment)]
        given: dict[str, Any] = {"statistics": statistics}
        if isinstance(self.treatment, OneShot):
            given["history"] = rows
        unseen = self.unseen(statistics)
        seen = [target for target in self.targets if target not in unseen]
        by_magnitude = ByMagnitude(self.treatment.sparsity, self.treatment.pattern)
        pairs = [(seen, replace(self.treatment, **given)), (unseen, by_magnitude)]
        return [(_named(targets), treatment) for targets, treatment in pairs if targets]

    def tell(self, rows: list[OneShotRow]) -> None:
        """Add the rows of these tensors to the history that the user gave `OneShot`."""
        history = self.treatment.history if isinstance(self.treatment, OneShot) else None
        if history is not None:
            names = {target.name for target in self.targets}
            history.extend(row for row in rows if row.name in names)

    def unseen(self, statistics: Statistics) -> list[Target]:
        """Return the tensors that no input was recorded for."""
        grams = statistics.grams
        return [t for t in self.targets if grams is None or not grams.samples(t.name)]


def block_rules(
    model: nn.Module, blocks: Mapping[str, nn.Module], rules: Rules
) -> dict[str, list[Group]]:
    """Return the groups of each block, without tensors whose treatment is None.

    Raises:
        ValueError: a rule reaches no tensor in a block, or a tensor belongs to several blocks.
        TypeError: a tensor cannot be masked, or a treatment is none.
    """
    targets = tensors_of(model)
    block_of = {id(m): name for name, block in blocks.items() for m in block.modules()}
    homes = {
        target: list(dict.fromkeys(block_of.get(id(site.module)) for site in target.sites))
        for target in targets
    }
    inside = [target for target, names in homes.items() if any(names)]
    pairs = [
        (spec, treatment)
        for spec, treatment in as_pairs(rules)
        if treatment is not None or not _only_outside(spec, targets, inside)
    ]
    groups = group_by_rule({n: spec for n, (spec, _) in enumerate(pairs)}, inside)
    found: dict[str, list[Group]] = {name: [] for name in blocks}
    for number, group in groups.items():
        treatment = as_treatment(pairs[number][1])
        if treatment is None:
            continue
        by_block: dict[str, list[Target]] = {}
        for target in group:
            check_maskable(target, compact=False)
            by_block.setdefault(_only(homes[target], target), []).append(target)
        for name, members in by_block.items():
            found[name].append(Group(members, treatment))
    return found


def _only_outside(spec: Spec | None, targets: list[Target], inside: list[Target]) -> bool:
    """Whether a target reaches tensors, but none in a block: `{"lm_head": None}` is no mistake."""
    reached = [target for target in targets if spec is not None and reaches(spec, target)]
    return bool(reached) and not any(target in inside for target in reached)


def _only(names: list[str | None], target: Target) -> str:
    """Return the block of `target`."""
    blocks = [name for name in names if name is not None]
    if len(blocks) > 1:
        raise ValueError(
            f'a tensor must belong to one block; "{target.name}" is shared by {listed(blocks)}. '
            "Leave it dense, with a `None` rule placed before the others, or give a block that "
            "contains these."
        )
    return blocks[0]


def _named(targets: list[Target]) -> Spec:
    """Return a left side of a rule that reaches exactly `targets`."""
    if len(targets) == 1:
        return targets[0].name
    names = {name for target in targets for name, _ in target.owners}

    def is_named(name: str, module: nn.Module, tensor: Tensor) -> bool:
        return name in names

    return is_named
