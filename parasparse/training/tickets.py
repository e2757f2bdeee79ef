"""Lottery tickets: prune trained weights, rewind the others, train again."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.optim import Optimizers, check_in_optimizer, each_optimizer
from parasparse.rules.assignments import as_pairs, assignments
from parasparse.rules.prune import Prune
from parasparse.rules.types import Rules
from parasparse.rules.warn import warn_emptied, warn_left_dense
from parasparse.scores.weights_alone import Score
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
from parasparse.training.rewinding import rewind, snapshot
from parasparse.training.scaled_rules import (
    as_rules,
    check_floors_at_the_end,
    scaled,
    with_sparsity,
)
from parasparse.verbs.sparsify import apply


class LotteryTicket(Controller):
    """Prunes iteratively with rewinding: each round gives the early weights a sparser mask.

    You train the model in each round, and `prune()` ends the round. It ranks the remaining entries
    by their trained weights and makes the masks sparser. Everything else returns to its state at
    step `rewind_step`: weights, biases, BatchNorm's statistics, the optimizer's state. After round
    r of R the sparsity is 1 - (1 - s) ** (r / R); after all rounds the model holds the ticket.
    Create learning rate schedulers again in each round, because learning rates are rewound too.

    Args:
        model: is changed in place; all entries are kept at first.
        rules: as in `sparsify`; each treatment is a sparsity s, a `Prune` with one, or None.
        optimizer: is rewound with the model; a sequence of optimizers: all of them are; None: no
            optimizer is rewound.
        rounds: R, the number of rounds, >= 1.
        rewind_step: number of `step()` calls after which the state is saved, >= 0; 0: now.

    Attributes:
        rounds: as given.
        steps: number of `step()` calls in this round.
        round: r, the number of rounds that have ended.
        history: one `Update` for each round.

    Raises:
        TypeError, ValueError: a treatment has no sparsity, `sparsify` refuses the rules, the
            optimizer does not hold a masked parameter, or a number is out of range. The model is
            unchanged.

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
        optimizer: Optimizers | None = None,
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
        check_floors_at_the_end(assigned, self._rules)
        if optimizer is not None:
            check_in_optimizer(optimizer, [each.target for each in assigned])
        self._names = {each.target.name for each in assigned}
        warn_left_dense(assigned, stacklevel=2)
        apply(model, assigned)
        self._start, self.history = copied(masks_of(model, self._names)), []
        self._checkpoint: dict[str, Any] | None = None
        self._remember()

    def step(self) -> None:
        """Count a step of this round; call it after `optimizer.step()`."""
        self.steps += 1
        self._remember()

    def prune(self) -> None:
        """End a round: make the masks sparser and rewind everything else to `rewind_step`.

        Raises:
            RuntimeError: all rounds have ended, step `rewind_step` has not been reached, or a mask
                was removed.
            ValueError: a score is NaN. The model is unchanged.
        """
        if self.round >= self.rounds:
            raise RuntimeError(
                f"`prune` must be called once per round; all {self.rounds} rounds have ended, and "
                "the model holds the ticket."
            )
        if self._checkpoint is None:
            raise RuntimeError(
                f"`prune` must be called after step {self.rewind_step}, to which it rewinds; "
                f"`step()` has been called {self.steps} times."
            )
        before = copied(masks_of(self.model, self._names))
        check_shapes(before, self._start)
        assigned = assignments(self.model, self._rules_at(self.round + 1, before), pairs=True)
        warn_emptied(assigned, stacklevel=2)
        apply(self.model, assigned)
        self.round += 1
        after = masks_of(self.model, self._names)
        self.history.append(update_of(self.steps, before, after, self._start))
        rewind(self.model, self._checkpoint["model"])
        if self.optimizer is not None:
            saved = copy.deepcopy(self._checkpoint["optimizer"])
            for each, state in zip(each_optimizer(self.optimizer), saved, strict=True):
                each.load_state_dict(state)
        self.steps = self.rewind_step

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state; save those of the model (with masks) and optimizer too."""
        return {
            "steps": self.steps, "round": self.round, "checkpoint": self._checkpoint,
            "asked": self._asked(),
            **saved(self.history, self._start),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state is for other tensors, more rounds, or another number of
                optimizers; or all rounds have ended, at another sparsity.
        """
        (history, start), checkpoint = loaded(state_dict, self._start), state_dict["checkpoint"]
        ours = 0 if self.optimizer is None else len(each_optimizer(self.optimizer))
        theirs = ours if checkpoint is None else len(checkpoint["optimizer"] or ())
        if state_dict["round"] > self.rounds or theirs != ours:
            raise ValueError(
                f"`state_dict` must be from at most {self.rounds} rounds, and with an optimizer if "
                f"this controller has one (it has {ours}); it is from round {state_dict['round']}, "
                f"with {theirs} optimizers."
            )
        asked, given = self._asked(), tuple(state_dict.get("asked", self._asked()))
        if state_dict["round"] == self.rounds and given != asked:
            raise ValueError(
                f"all {self.rounds} rounds of `state_dict` have ended, at sparsities of {given}; "
                f"the rules of this controller have {asked}. Give it more `rounds`."
            )
        self.steps, self.round = state_dict["steps"], state_dict["round"]
        self.history, self._start, self._checkpoint = history, start, checkpoint

    def _asked(self) -> tuple[float | None, ...]:
        return tuple(None if prune is None else prune.sparsity for _, prune in self._rules)

    def _remember(self) -> None:
        if self._checkpoint is None and self.steps == self.rewind_step:
            states = None
            if self.optimizer is not None:
                states = tuple(each.state_dict() for each in each_optimizer(self.optimizer))
            self._checkpoint = {"model": snapshot(self.model), "optimizer": copy.deepcopy(states)}

    def _rules_at(self, number: int, masks: Masks) -> Any:
        return as_rules([(spec, self._at(prune, number, masks)) for spec, prune in self._rules])

    def _at(self, prune: Prune | None, number: int, masks: Masks) -> Prune | None:
        if prune is None or prune.sparsity is None or number == 0:
            return scaled(prune, 0.0)
        kept = (1 - prune.sparsity) ** (number / self.rounds)
        # Norms do not accept negative scores.
        lowest = -math.inf if getattr(prune.pattern, "norm", None) is None else 0.0
        return replace(prune, sparsity=1 - kept, score=_among(prune.score, masks, lowest))


def _among(score: Score, masks: Masks, lowest: float) -> Score:
    """Return `score` with `lowest` where `masks` drop, so dropped entries do not come back."""

    def scored(tensor: Tensor, name: str) -> Tensor:
        scores = score(tensor, name)
        if name not in masks or scores.shape != tensor.shape:  # `Prune` refuses them
            return scores
        values = scores if scores.is_floating_point() else scores.double()
        mask = masks[name]
        assert isinstance(mask, Tensor)  # compact weights have been refused
        return torch.where(mask, values, lowest)

    return scored
