"""Gradual magnitude pruning, by any score and pattern: masks that follow a schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.counts import check_sparsity
from parasparse.optim import check_held, parameters_of, zero_entries
from parasparse.rules.assignments import as_pairs, assignments
from parasparse.rules.types import Rules
from parasparse.schedules import as_every
from parasparse.sharding.fsdp import reshard
from parasparse.targets.reach import masked_targets
from parasparse.targets.tensors import Target
from parasparse.text import listed
from parasparse.training.controller import Record, Recorded
from parasparse.training.history import copied, masks_of
from parasparse.training.scaled_rules import as_rules, scaled, with_sparsity
from parasparse.verbs.sparsify import apply, sparsify


class GradualPruning(Recorded):
    """Prunes `model` by `rules` while it trains: at step k to schedule(k) times each sparsity.

    Targets are absolute, of all entries, and every update ranks the stored weights anew: entries
    come back when the schedule falls, or when others have become smaller. What the optimizer keeps
    for dropped and for grown entries is set to 0.

    Args:
        model: changed in place; schedule(0) holds at once.
        rules: as for `sparsify`; each treatment a sparsity or a `Prune` with one, or None.
        optimizer: holds the masked parameters; None: nobody's state is touched.
        schedule: `int -> float` in [0, 1]. If it has a `stop`, the first update at or past it is
            the last.
        every: update at each so-many-th step; or `int -> bool`, such as `schedules.Every`.

    Attributes:
        history: an `Update` for each.
        steps: how many times `step()` has been called.

    Raises:
        TypeError, ValueError: a rule without a sparsity, or as for `sparsify`; the optimizer does
            not hold a masked parameter. The model is as it was.

    Examples:
        >>> from parasparse.schedules import Cubic
        >>> model = nn.Linear(10, 10)
        >>> pruner = GradualPruning(model, 0.9, schedule=Cubic(0.0, 1.0, stop=20), every=10)
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
        optimizer: torch.optim.Optimizer | None = None,
        *,
        schedule: Callable[[int], float],
        every: int | Callable[[int], bool],
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.every = as_every(every)
        self.steps = 0
        self._is_over = False
        self._rules = [(spec, with_sparsity(treatment)) for spec, treatment in as_pairs(rules)]
        rules = self._rules_at(0)
        assigned = assignments(model, rules, pairs=True)
        if optimizer is not None:
            check_held(optimizer, [each.target for each in assigned])
        self._names = [each.target.name for each in assigned]
        apply(model, assigned)
        self._record = Record(self._masks())

    def step(self) -> None:
        """Count a step, and update the masks if it is time; call it after `optimizer.step()`.

        Raises:
            ValueError: the schedule leaves [0, 1], or a score is NaN. Masks are as they were.
            RuntimeError: a mask was taken off.
        """
        step = self.steps + 1
        if not self._is_over and self.every(step):
            reshard(self.model)
            self._update(step)
            self._is_over = step >= getattr(self.schedule, "stop", step + 1)
        self.steps = step

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs; the masks are in the model's own."""
        return {
            "steps": self.steps,
            "is_over": self._is_over,
            **self._record.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another stood; load the model's and the optimizer's state as well.

        Raises:
            ValueError: it had other tensors.
        """
        record = self._record.loaded(state_dict)
        self.steps, self._is_over = state_dict["steps"], state_dict["is_over"]
        self._record = record

    def _update(self, step: int) -> None:
        before = copied(self._masks())
        gone = [name for name in self._names if name not in before]
        if gone:
            raise RuntimeError(
                f"the masks of `model` must stay where they are; those of {listed(gone)} were "
                "taken off or unset. Make a new controller."
            )
        sparsify(self.model, self._rules_at(step))
        after = self._masks()
        if self.optimizer is not None:
            for target in self._targets():
                changed = before[target.name] ^ after[target.name]
                for parameter in parameters_of(target):
                    zero_entries(self.optimizer, parameter, changed)
        self.history.append(self._record.change(step, before, after))

    def _rules_at(self, step: int) -> Any:
        share = check_sparsity(self.schedule(step), f"schedule({step})")
        return as_rules([(spec, scaled(prune, share)) for spec, prune in self._rules])

    def _targets(self) -> list[Target]:
        names = set(self._names)
        return [target for target in masked_targets(self.model) if target.name in names]

    def _masks(self) -> dict[str, Tensor]:
        return masks_of(self._targets())
