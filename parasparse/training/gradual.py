"""Gradual pruning: the sparsity follows a schedule during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from parasparse.counts import check_sparsity
from parasparse.masks.kept_entries import KeptEntries
from parasparse.optim import (
    Optimizers,
    check_clearable,
    check_in_optimizer,
    parameters_of,
    zero_entries,
)
from parasparse.rules.assignments import Assignment, as_pairs, assignments
from parasparse.rules.types import Rules
from parasparse.rules.warn import warn_emptied, warn_left_dense
from parasparse.schedules import as_every
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import masked_targets
from parasparse.training.controller import Controller
from parasparse.training.history import (
    Masks,
    check_shapes,
    copied,
    loaded,
    masks_of,
    saved,
    update_of,
)  # fmt: skip
from parasparse.training.present import counts_of, kept_now
from parasparse.training.scaled_rules import (
    as_rules,
    check_floors_at_the_end,
    raised,
    sparsities,
    with_sparsity,
)
from parasparse.verbs.moving import check_may_resize
from parasparse.verbs.sparsify import apply


class GradualPruning(Controller):
    """Prunes `model` during training, at step k to schedule(k) times each sparsity of `rules`.

    A model that is sparse already is not opened: at step k its sparsity is p + schedule(k) (s - p).
    Here s is the sparsity of the rule, and p that of the tensor when the controller is created (of
    all tensors of the rule together, with `scope="global"`). If p > s, the sparsity stays p.

    Sparsities are absolute, and every update ranks all stored weights again, so entries come back
    when the schedule falls or when other entries have become smaller. The optimizer state of
    dropped and of returning entries is set to 0.

    Compact weights become shorter, and the optimizer's state with them. What they drop is gone, so
    no entry comes back.

    Args:
        model: is changed in place; schedule(0) is applied immediately.
        rules: as in `sparsify`; each treatment is a sparsity, a `Prune` with one, or None.
        optimizer: holds the masked parameters, or a sequence of optimizers that hold them; None: no
            optimizer state is changed.
        schedule: `int -> float` in [0, 1]. If it has an attribute `stop`, the first update at or
            after this step is the last.
        every: number of steps between updates, or `int -> bool`, such as `schedules.Every`.
        reopen: whether to start as if the model were dense (p = 0). By default, the entries that
            are masked are sparse; in a tensor without a mask those that are 0, unless all are.
            Needed for layers that are initialised with an identity.

    Attributes:
        history: one `Update` for each change of masks.
        steps: number of `step()` calls so far.

    Raises:
        TypeError, ValueError: a treatment has no sparsity, `sparsify` refuses the rules, or the
            optimizer does not hold a masked parameter. The model is unchanged.

    Examples:
        >>> cubic = schedules.Cubic(0.0, 1.0, stop=20)
        >>> pruner = GradualPruning(nn.Linear(10, 10), 0.9, schedule=cubic, every=10)
        >>> for _ in range(20): pruner.step()
        >>> [(update.step, round(update.sparsity["weight"], 2)) for update in pruner.history]
        [(10, 0.79), (20, 0.9)]

    Reference: Zhu & Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878, section 3. Differs:
        entries may come back.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        optimizer: Optimizers | None = None,
        *,
        schedule: Callable[[int], float],
        every: int | Callable[[int], bool],
        reopen: bool = False,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.every = as_every(every)
        self.steps, self._is_over = 0, False
        self._rules = [(spec, with_sparsity(treatment)) for spec, treatment in as_pairs(rules)]
        self._present: list[dict[str, tuple[int, int]]] = [{} for _ in self._rules]
        assigned = assignments(model, self._rules_at(0), pairs=True, compact=True)
        check_floors_at_the_end(assigned, self._rules)
        if optimizer is not None:
            check_in_optimizer(optimizer, [each.target for each in assigned])
        check_may_resize(model, [each.target for each in assigned])
        warn_left_dense(assigned, stacklevel=2)
        self._names = {each.target.name for each in assigned}
        kept = {each.target.name: kept_now(each, reopen=reopen) for each in assigned}
        self._find_present(assigned, kept)
        if self.schedule(0) == 0:
            assigned[:] = [replace(each, result=kept[each.target.name]) for each in assigned]
        elif any(zeros for group in self._present for zeros, _ in group.values()):
            assigned = assignments(model, self._rules_at(0), pairs=True, compact=True)
        warn_emptied(assigned, stacklevel=2)
        apply(model, assigned, optimizer)
        self._start, self.history = copied(masks_of(model, self._names)), []

    def step(self) -> None:
        """Count a step, and update the masks if one is due; call it after `optimizer.step()`.

        Raises:
            ValueError: the schedule leaves [0, 1], or a score is NaN. Masks are unchanged.
            RuntimeError: a mask was removed.
        """
        step = self.steps + 1
        if not self._is_over and self.every(step):
            reshard(self.model)
            self._update(step)
            self._is_over = step >= self._stop
        self.steps = step

    def unfinished(self) -> str:
        """Say what is missing if training ends now, before the schedule does; "" if nothing is."""
        if self._is_over or self._stop == math.inf:
            return ""
        start = self._start
        reached = (self.history or [update_of(0, start, start, start)])[-1].total
        asked = f"{self._asked():.1%}"
        if f"{reached:.1%}" == asked:
            return ""
        return (
            f"the sparsity is {reached:.1%} after {self.steps} steps; the schedule reaches {asked} "
            f"in the first update at or after step {self._stop}. Train longer, or lower the `stop` "
            "of the schedule."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state; save those of the model (with masks) and optimizer too."""
        return {
            "steps": self.steps,
            "is_over": self._is_over,
            "stop": self._stop,
            "asked": self._asked(),
            "present": {name: n for group in self._present for name, n in group.items()},
            **saved(self.history, self._start),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state; raise ValueError if it is for other tensors."""
        history, start = loaded(state_dict, self._start)
        steps, is_over = state_dict["steps"], state_dict["is_over"]
        present = state_dict.get("present", {})
        self._present = [{n: present.get(n, group[n]) for n in group} for group in self._present]
        self.history, self._start = history, start
        # This schedule says where it ends; the saved run may have ended earlier, or less sparse.
        ours = {"stop": self._stop, "asked": self._asked()}
        same = ours == {name: state_dict.get(name, ours[name]) for name in ours}  # older have none
        self.steps, self._is_over = steps, is_over and same

    def _find_present(self, assigned: list[Assignment], kept: Masks) -> None:
        """Count the zeros that are there, where `kept` are the masks that drop them."""
        for (spec, prune), group in zip(self._rules, self._present, strict=True):
            names = [each.target.name for each in assigned if each.rule is spec]
            if prune is not None and names:
                group.update(counts_of({n: kept[n] for n in names}, prune.pattern))

    def _asked(self) -> float:
        """Return the sparsity of all tensors together at the end of the schedule; 0 without end."""
        if self._stop == math.inf:
            return 0.0
        share, asked = self.schedule(int(self._stop)), dict[str, float]()
        for (_, prune), group in zip(self._rules, self._present, strict=True):
            asked |= sparsities(prune, share, group)
        sizes = {name: self._start[name].numel() for name in asked}
        return sum(asked[n] * sizes[n] for n in asked) / max(1, sum(sizes.values()))

    @property
    def _stop(self) -> float:
        return getattr(self.schedule, "stop", math.inf)

    def _update(self, step: int) -> None:
        before = copied(masks_of(self.model, self._names))
        check_shapes(before, self._start)
        targets = [t for t in masked_targets(self.model) if t.name in before]
        if self.optimizer is not None:
            check_clearable(self.optimizer, [p for t in targets for p in parameters_of(t)])
        if not self._waits_at(step):
            assigned = assignments(self.model, self._rules_at(step), pairs=True, compact=True)
            warn_emptied(assigned, stacklevel=3)
            apply(self.model, assigned, self.optimizer)
        after = masks_of(self.model, self._names)
        if self.optimizer is not None:
            for target in targets:
                old, new = before[target.name], after[target.name]
                if isinstance(old, KeptEntries) or isinstance(new, KeptEntries):
                    continue  # their state has followed them
                changed = old ^ new
                for parameter in parameters_of(target):
                    zero_entries(self.optimizer, parameter, changed)
        self.history.append(update_of(step, before, after, self._start))

    def _waits_at(self, step: int) -> bool:
        """Whether the schedule has not risen yet, so that the masks stay those of the start."""
        at_zero = self.schedule(step) == self.schedule(0) == 0
        return at_zero and not any(update.churn for update in self.history)

    def _rules_at(self, step: int) -> Any:
        share = check_sparsity(self.schedule(step), f"schedule({step})")
        rules = zip(self._rules, self._present, strict=True)
        return as_rules([(spec, raised(prune, share, now)) for (spec, prune), now in rules])
