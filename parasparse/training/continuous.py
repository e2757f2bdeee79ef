"""Continuous Sparsification: soft masks that harden during training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.dtypes import total
from parasparse.masks.gate_kinds import Sigmoid
from parasparse.masks.soft_mask import SoftMask
from parasparse.rules.assignments import assignments
from parasparse.rules.types import Rules
from parasparse.rules.warn import warn_left_dense
from parasparse.sharding.dtensors import count_nonzero
from parasparse.targets.reach import masked_targets
from parasparse.text import listed
from parasparse.training.controller import Controller
from parasparse.training.history import (
    Masks,
    copied,
    laid_out_as,
    loaded,
    masks_lost,
    saved,
    update_of,
)
from parasparse.training.rewinding import rewind, snapshot, snapshot_keys
from parasparse.verbs.sparsify import apply


class ContinuousSparsification(Controller):
    """Trains each weight w with a soft mask, w sigmoid(T s) / sigmoid(s0), while T rises.

    Minimise the task's loss + lambda * `penalty()`, with weight decay only on
    `weight_parameters()`. After k calls of `step()`, T = final_temperature ** (k / (steps - 1));
    it rises no further.

    `prune()` ends a round: s <- min(T s, s0), and T is 1 again. With `ticket = True`, masks are
    hard, (s > 0) / sigmoid(s0), and no longer train: `rewind()` the weights and train the ticket.
    `binarize` makes the masks bool and folds their scale into the weights.

    Args:
        model: is changed in place; create optimizers afterwards.
        rules: as in `sparsify`; each treatment is a `Gate` of `gates.sigmoid` or None.
        final_temperature: T at the end of a round, >= 1.
        steps: calls of `step()` per round, >= 2: one per `optimizer.step()`, or one per epoch as in
            the paper.

    Attributes:
        steps: as given.
        step_in_round: k, the number of `step()` calls in this round.
        rounds: number of rounds that have ended.
        history: one `Update` for each `prune()`, of the hard masks at the end of the round.

    Raises:
        TypeError, ValueError: `sparsify` refuses the rules, a treatment is not such a `Gate`, or a
            number is out of range. The model is unchanged.

    Examples:
        >>> model = nn.Linear(4, 4)
        >>> cs = ContinuousSparsification(model, Gate(init=0.1), final_temperature=100.0, steps=3)
        >>> for _ in range(2): cs.step(); print(cs.temperature)
        10.0
        100.0

    Reference: Savarese, Silva, Maire, "Winning the Lottery with Continuous Sparsification", 2019,
        arXiv:1912.04427, sections 3 and 4, algorithm 2. Differs: `prune` uses the final T of the
        round, as the paper says; the authors' code has already reset it to 1.
    """

    def __init__(
        self, model: nn.Module, rules: Rules, *, final_temperature: float = 200.0, steps: int
    ) -> None:
        if not (math.isfinite(final_temperature) and final_temperature >= 1):
            raise ValueError(
                f"`final_temperature` must be finite and at least 1; got {final_temperature!r}."
            )
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(
                f"`steps` must be an integer >= 2, for T = 1 and the final T; got {steps!r}."
            )
        assigned = assignments(model, rules, pairs=True)
        others = [each.target.name for each in assigned if not _is_sigmoid(each.result)]
        if others or not assigned:
            wrong = f"{listed(others)} have other treatments" if others else "all are None"
            raise ValueError(
                "`rules` must give at least one tensor a `Gate` of `gates.sigmoid`, and the others "
                f"such a `Gate` or None; {wrong}."
            )
        self.model, self.final_temperature, self.steps = model, final_temperature, steps
        self.step_in_round, self.rounds = 0, 0
        self._names = [each.target.name for each in assigned]
        warn_left_dense(assigned, stacklevel=2)
        apply(model, assigned)
        self._last: Masks = self._hard()
        self._start, self.history = copied(self._last), []
        self._checkpoint: dict[str, Any] | None = None

    @property
    def temperature(self) -> float:
        """T, the same for all masks; set it to any number above 0."""
        return float(self._gates()[0].temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        _check_temperature(value)
        with torch.no_grad():
            for gate in self._gates():
                gate.temperature.fill_(value)  # in place, which needs no recompilation

    @property
    def ticket(self) -> bool:
        """Whether masks are hard."""
        return all(gate.hard for gate in self._gates())

    @ticket.setter
    def ticket(self, value: bool) -> None:
        gates = self._gates()
        if value and not any(bool((gate.logits > 0).any()) for gate in gates):
            warnings.warn(
                "no logit is above 0, so the ticket keeps nothing. This is always the case after "
                "`prune` with an `init` of 0 or less: set `ticket` before it.",
                stacklevel=2,
            )
        for gate in gates:
            gate.hard = bool(value)

    def penalty(self) -> Tensor:
        """Return the sum of all masks, a differentiable scalar."""
        return torch.stack([total(gate.mask) for gate in self._gates()]).sum()

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the logits of the gates, which should get no weight decay."""
        return list(dict.fromkeys(gate.logits for gate in self._gates()))  # units may share them

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the model except the logits of gates."""
        gates = [module for module in self.model.modules() if isinstance(module, SoftMask)]
        logits = {id(gate.logits) for gate in gates}
        return [p for p in self.model.parameters() if id(p) not in logits]

    def checkpoint(self) -> None:
        """Save the weights and the state of other layers for `rewind`."""
        self._checkpoint = snapshot(self.model)

    def rewind(self) -> None:
        """Restore the state that `checkpoint` saved; masks stay.

        Raises:
            RuntimeError: there is no checkpoint, or a gate was removed.
        """
        self._by_name()  # after `binarize`, weights contain the scale of the masks
        if self._checkpoint is None:
            raise RuntimeError("`checkpoint()` must be called before `rewind()`.")
        rewind(self.model, self._checkpoint)

    @torch.no_grad()
    def prune(self, temperature: float | None = None) -> None:
        """End a round: s <- min(T s, s0), then T = 1.

        Args:
            temperature: T in this formula, > 0; None: the current T. The authors' code uses 1.
        """
        by = _check_temperature(self.temperature if temperature is None else temperature)
        hard = self._hard()
        self.history.append(update_of(self.step_in_round, self._last, hard, self._start))
        self._last = hard
        for logits, init in {gate.logits: gate.init for gate in self._gates()}.items():
            logits.copy_((by * logits).clamp(max=init))
        self.rounds, self.step_in_round = self.rounds + 1, 0
        self.temperature = 1.0

    def remaining(self) -> float:
        """Return the share of mask entries that are currently not 0."""
        masks = [gate.mask for gate in self._gates()]
        kept = sum(count_nonzero(mask != 0) for mask in masks)
        return kept / max(1, sum(mask.numel() for mask in masks))

    def step(self) -> None:
        """Count a step and raise the temperature; call it after `optimizer.step()`."""
        self.step_in_round += 1
        if (self.rounds, self.step_in_round) == (0, 2):
            self._warn_if_nothing_trains()
        share = min(1.0, self.step_in_round / (self.steps - 1))
        self.temperature = self.final_temperature**share

    def unfinished(self) -> str:
        """Say what is missing if training ends now, in the middle of a round; "" if nothing is."""
        if self.ticket or not 0 < self.step_in_round < self.steps - 1:
            return ""
        return (
            f"the temperature is {self.temperature:.3g} after {self.step_in_round} steps of the "
            f"round; it reaches {self.final_temperature:.3g} at step {self.steps - 1}. Train "
            "longer, or lower `steps`."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state; save the model (with logits) and optimizer too."""
        return {
            "settings": self._settings(), "step_in_round": self.step_in_round,
            "rounds": self.rounds, "ticket": self.ticket, **saved(self.history, self._start),
            "last": copied(self._last), "checkpoint": self._checkpoint,
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state; raise ValueError if it is for other tensors or settings."""
        history, start = loaded(state_dict, self._start)
        last = laid_out_as(start, state_dict["last"])
        theirs, ours = state_dict["settings"], self._settings()
        if theirs != ours:
            raise ValueError(f"`state_dict` must have the settings {ours}; it has {theirs}.")
        checkpoint, ticket = state_dict["checkpoint"], state_dict["ticket"]
        keys = snapshot_keys(self.model)
        if checkpoint is not None and checkpoint.keys() != keys:
            raise ValueError(
                "the checkpoint in `state_dict` must have the tensors of this model; only one of "
                f"the two has {listed(sorted(checkpoint.keys() ^ keys))}."
            )
        self.step_in_round, self.rounds = state_dict["step_in_round"], state_dict["rounds"]
        self.history, self._start = history, start
        self._last, self._checkpoint = last, checkpoint
        for gate in self._gates():
            gate.hard = ticket

    def _warn_if_nothing_trains(self) -> None:
        gates = self._gates()
        moved = any(bool((gate.logits != gate.init).any()) for gate in gates)
        if not moved and any(bool(g.logits.grad.any()) for g in gates if g.logits.grad is not None):
            warnings.warn(
                "the logits of the gates have gradients but have not moved in two steps: an "
                "optimizer must hold `mask_parameters()`. Create it after the controller.",
                stacklevel=3,
            )

    def _settings(self) -> list[float]:
        return [self.final_temperature, self.steps, *(gate.init for gate in self._gates())]

    def _gates(self) -> list[SoftMask]:
        return list(self._by_name().values())

    def _by_name(self) -> dict[str, SoftMask]:
        names = set(self._names)
        found = {t.name: t.masks()[0] for t in masked_targets(self.model) if t.name in names}
        gates = {name: mask for name, mask in found.items() if isinstance(mask, SoftMask)}
        if gates.keys() != names:
            raise masks_lost(sorted(names - gates.keys()))
        return gates

    def _hard(self) -> dict[str, Tensor]:
        return {name: gate.logits > 0 for name, gate in self._by_name().items()}


def _is_sigmoid(module: Any) -> bool:
    return isinstance(module, SoftMask) and isinstance(module.kind, Sigmoid)


def _check_temperature(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`temperature` must be finite and above 0; got {value!r}.")
    return value
