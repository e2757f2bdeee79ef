"""Lottery tickets: prune what was trained, rewind the rest, train again."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.optim import check_held
from parasparse.rules.assignments import as_pairs, assignments
from parasparse.rules.prune import Prune
from parasparse.rules.types import Rules
from parasparse.scores.weights_alone import Score
from parasparse.targets.reach import masked_targets
from parasparse.text import listed
from parasparse.training.controller import Record, Recorded
from parasparse.training.history import copied, masks_of
from parasparse.training.rewinding import rewind, snapshot
from parasparse.training.scaled_rules import as_rules, scaled, with_sparsity
from parasparse.verbs.sparsify import apply


class LotteryTicket(Recorded):
    """Iterative pruning with rewinding: round after round, sparser masks on the first weights.

    Make learning rate schedulers anew in each round: the optimizer's rates are rewound, too.

    A round is a training of yours that `prune()` ends: the masks become sparser, ranked by the
    trained weights among those that are left, and everything else goes back to where it was at step
    `rewind_step`: weights, biases, BatchNorm's statistics, the optimizer's state. After round r of
    R the sparsity is 1 - (1 - s) ** (r / R); after all of them the model holds the ticket.

    Args:
        model: changed in place; all of its entries are kept at first.
        rules: as for `sparsify`; each treatment a sparsity or a `Prune` with one, or None.
        optimizer: is rewound with the model; None: nobody's state is.
        rounds: R, how many times to prune.
        rewind_step: 0: the weights as they are now; k: as they are after k calls of `step()`.

    Attributes:
        rounds: as given.
        steps: how many times `step()` has been called in this round.
        round: r, how many rounds have ended.
        history: an `Update` for each.

    Raises:
        TypeError, ValueError: a rule without a sparsity, or as for `sparsify`; the optimizer does
            not hold a masked parameter. The model is as it was.

    Examples:
        >>> model = nn.Linear(10, 10)
        >>> first = model.weight.detach().clone()
        >>> lottery = LotteryTicket(model, 0.75, rounds=2)
        >>> for _ in range(2):
        ...     _ = model.parametrizations.weight.original.data.normal_()  # your training
        ...     lottery.prune()
        >>> [update.sparsity["weight"] for update in lottery.history]
        [0.5, 0.75]
        >>> bool(((model.weight == first) | (model.weight == 0)).all())
        True

    Reference: Frankle, Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv:1803.03635, section 2.
        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
        arXiv:1912.05671, algorithm 2, for `rewind_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        rounds: int,
        rewind_step: int = 0,
    ) -> None:
        if rounds < 1 or rewind_step < 0:
            raise ValueError(
                "`rounds` must be at least 1 and `rewind_step` at least 0; got "
                f"{rounds!r} and {rewind_step!r}."
            )
        self.model, self.optimizer = model, optimizer
        self.rounds, self.rewind_step = rounds, rewind_step
        self.steps, self.round = 0, 0
        self._rules = [(spec, with_sparsity(rule)) for spec, rule in as_pairs(rules)]
        assigned = assignments(model, self._rules_at(0, {}), pairs=True)
        if optimizer is not None:
            check_held(optimizer, [each.target for each in assigned])
        self._names = {each.target.name for each in assigned}
        apply(model, assigned)
        self._record = Record(self._masks())
        self._checkpoint: dict[str, Any] | None = None
        self._remember()

    def step(self) -> None:
        """Count a step of this round; call it after `optimizer.step()`."""
        self.steps += 1
        self._remember()

    def prune(self) -> None:
        """End a round: sparser masks, and everything else as it was at `rewind_step`.

        Raises:
            RuntimeError: all rounds have ended; or no step `rewind_step` has been reached yet.
            ValueError: a score is NaN. The model is as it was.
        """
        if self.round >= self.rounds:
            raise RuntimeError(
                f"`prune` must be called once in each of the {self.rounds} rounds, which have "
                "ended: the model holds the ticket."
            )
        if self._checkpoint is None:
            raise RuntimeError(
                f"`prune` must come after step {self.rewind_step}, to which it rewinds; `step()` "
                f"has been called {self.steps} times."
            )
        before = copied(self._masks())
        if before.keys() != self._names:
            raise RuntimeError(
                "the masks of `model` must stay where they are; those of "
                f"{listed(sorted(self._names - before.keys()))} were taken off."
            )
        apply(
            self.model, assignments(self.model, self._rules_at(self.round + 1, before), pairs=True)
        )
        self.round += 1
        self.history.append(self._record.change(self.steps, before, self._masks()))
        rewind(self.model, self._checkpoint["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self._checkpoint["optimizer"]))
        self.steps = self.rewind_step

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs; the masks are in the model's own."""
        return {
            "steps": self.steps,
            "round": self.round,
            **self._record.state(),
            "checkpoint": self._checkpoint,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another stood; load the model's and the optimizer's state as well.

        Raises:
            ValueError: it had other tensors, more rounds, or an optimizer where there is none.
        """
        record, checkpoint = self._record.loaded(state_dict), state_dict["checkpoint"]
        rewinds = None if checkpoint is None else checkpoint["optimizer"] is not None
        if state_dict["round"] > self.rounds or rewinds == (self.optimizer is None):
            raise ValueError(
                "`state_dict` must be of as many rounds as here, and of an optimizer where there "
                f"is one; it is in round {state_dict['round']} of {self.rounds}, with an "
                f"optimizer: {rewinds}."
            )
        self.steps, self.round = state_dict["steps"], state_dict["round"]
        self._record, self._checkpoint = record, checkpoint

    def _remember(self) -> None:
        if self._checkpoint is None and self.steps == self.rewind_step:
            state = None if self.optimizer is None else self.optimizer.state_dict()
            self._checkpoint = {
                "model": snapshot(self.model), "optimizer": copy.deepcopy(state),
            }  # fmt: skip

    def _rules_at(self, number: int, masks: Mapping[str, Tensor]) -> Any:
        return as_rules([(spec, self._at(prune, number, masks)) for spec, prune in self._rules])

    def _at(self, prune: Prune | None, number: int, masks: Mapping[str, Tensor]) -> Prune | None:
        if prune is None or prune.sparsity is None or number == 0:
            return scaled(prune, 0.0)
        kept = (1 - prune.sparsity) ** (number / self.rounds)
        # A norm takes no negative scores.
        lowest = -math.inf if getattr(prune.pattern, "norm", None) is None else 0.0
        return replace(prune, sparsity=1 - kept, score=_among(prune.score, masks, lowest))

    def _masks(self) -> dict[str, Tensor]:
        return masks_of(
            target for target in masked_targets(self.model) if target.name in self._names
        )


def _among(score: Score, masks: Mapping[str, Tensor], lowest: float) -> Score:
    """Return `score`, but lowest of all for what `masks` drop: once dropped is dropped."""

    def scored(tensor: Tensor, name: str) -> Tensor:
        scores = score(tensor, name)
        if name not in masks or scores.shape != tensor.shape:  # for `Prune` to refuse
            return scores
        values = scores if scores.is_floating_point() else scores.double()
        return torch.where(masks[name], values, lowest)

    return scored
