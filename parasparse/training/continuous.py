"""Continuous Sparsification: soft masks that harden while the network trains."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.masks.gate_kinds import Sigmoid
from parasparse.masks.soft_mask import SoftMask
from parasparse.rules.assignments import assignments
from parasparse.rules.types import Rules
from parasparse.sharding.dtensors import count_nonzero
from parasparse.targets.reach import masked_targets
from parasparse.text import listed
from parasparse.training.controller import Record, Recorded
from parasparse.training.history import copied, first_masks_of
from parasparse.training.rewinding import rewind, snapshot, snapshot_keys
from parasparse.verbs.sparsify import apply


class ContinuousSparsification(Recorded):
    """Trains a soft mask beside each weight, w sigmoid(T s) / sigmoid(s0), and raises T.

    Minimise the task's loss + lambda * `penalty()`, with weight decay for `weight_parameters()`.
    After k calls of `step()`, T = final_temperature ** (k / (steps - 1)), and stays there.

    A round ends with `prune()`: s <- min(T s, s0), and T starts from 1 again. With `ticket` on,
    masks are hard, (s > 0) / sigmoid(s0), and no longer train: `rewind()` the weights and train the
    ticket. `binarize` makes the masks plain ones and folds their scale into the weights.

    Args:
        model: changed in place; make optimizers after this.
        rules: as for `sparsify`, each treatment a `Gate`, or None.
        final_temperature: T at the end of a round, >= 1.
        steps: calls of `step()` to a round, at least 2: those of `optimizer.step()`, or epochs for
            the staircase of the original.

    Attributes:
        steps: as given.
        step_in_round: k, how many times `step()` has been called in this round.
        rounds: how many rounds have ended.
        history: an `Update` for each `prune()`, of the hard masks that the round came to.

    Raises:
        TypeError, ValueError: as `sparsify`; a treatment makes no soft mask; a temperature under 1.
            The model is as it was.

    Examples:
        >>> from parasparse import Gate
        >>> model = nn.Linear(4, 4)
        >>> cs = ContinuousSparsification(model, Gate(init=0.1), final_temperature=100.0, steps=3)
        >>> for _ in range(2): cs.step(); print(cs.temperature)
        10.0
        100.0

    Reference: Savarese, Silva, Maire, "Winning the Lottery with Continuous Sparsification", 2019,
        arXiv:1912.04427, sections 3 and 4, algorithm 2. Differs: `prune` takes the T that the round
        came to, as the paper writes; the authors' program has set it to 1 by then.
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
                "`steps` must be a whole number of at least 2, from T = 1 to the end; got "
                f"{steps!r}."
            )
        assigned = assignments(model, rules, pairs=True)
        others = [each.target.name for each in assigned if not _is_sigmoid(each.result)]
        if others or not assigned:
            raise ValueError(
                "`rules` must give each tensor a `Gate` of `gates.sigmoid`, or None, and one or "
                f"more a `Gate`; {listed(others) or 'none'} get something else."
            )
        self.model, self.final_temperature, self.steps = model, final_temperature, steps
        self.step_in_round, self.rounds = 0, 0
        self._names = [each.target.name for each in assigned]
        apply(model, assigned)
        self._last = self._hard()
        self._record = Record(self._last)
        self._checkpoint: dict[str, Any] | None = None

    @property
    def temperature(self) -> float:
        """T, the same for all masks; set it to any number over 0."""
        return float(self._gates()[0].temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        _check_temperature(value)
        with torch.no_grad():
            for gate in self._gates():
                gate.temperature.fill_(value)  # in place: nothing is compiled anew

    @property
    def ticket(self) -> bool:
        """Whether masks are hard."""
        return all(gate.hard for gate in self._gates())

    @ticket.setter
    def ticket(self, value: bool) -> None:
        gates = self._gates()
        if value and not any(bool((gate.logits > 0).any()) for gate in gates):
            warnings.warn(
                "no logit is above 0, so that the ticket keeps nothing. After `prune` with an "
                "`init` of 0 or less this is always so: ask for the ticket before it.",
                stacklevel=2,
            )
        for gate in gates:
            gate.hard = bool(value)

    def penalty(self) -> Tensor:
        """Return the sum of all masks, a scalar with its graph."""
        return torch.stack([gate.mask.sum() for gate in self._gates()]).sum()

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the logits, which want no weight decay."""
        return [gate.logits for gate in self._gates()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the model that are no logits of a gate."""
        gates = [module for module in self.model.modules() if isinstance(module, SoftMask)]
        logits = {id(gate.logits) for gate in gates}
        return [p for p in self.model.parameters() if id(p) not in logits]

    def checkpoint(self) -> None:
        """Remember the weights, and the state of other layers, to rewind to."""
        self._checkpoint = snapshot(self.model)

    def rewind(self) -> None:
        """Give the model back what `checkpoint` remembered; masks stay.

        Raises:
            RuntimeError: there is no checkpoint.
        """
        self._by_name()  # after `binarize` the scale of the masks is in the weights
        if self._checkpoint is None:
            raise RuntimeError(
                "`checkpoint()` must be called before `rewind()`: nothing is kept yet."
            )
        rewind(self.model, self._checkpoint)

    @torch.no_grad()
    def prune(self, temperature: float | None = None) -> None:
        """End a round: s <- min(T s, s0), then T = 1.

        Args:
            temperature: T of this formula; None: the temperature that the round came to. 1 is what
                the authors' program does.
        """
        by = _check_temperature(self.temperature if temperature is None else temperature)
        hard = self._hard()
        self.history.append(self._record.change(self.step_in_round, self._last, hard))
        self._last = hard
        for gate in self._gates():
            gate.logits.copy_((by * gate.logits).clamp(max=gate.init))
        self.rounds, self.step_in_round = self.rounds + 1, 0
        self.temperature = 1.0

    def remaining(self) -> float:
        """Return the share of mask entries that are not 0 now."""
        masks = [gate.mask for gate in self._gates()]
        kept = sum(count_nonzero(mask != 0) for mask in masks)
        return kept / max(1, sum(mask.numel() for mask in masks))

    def step(self) -> None:
        """Count a step of this round and raise the temperature; call it after the optimizers'."""
        self.step_in_round += 1
        if (self.rounds, self.step_in_round) == (0, 2):
            self._warn_if_nothing_trains()
        share = min(1.0, self.step_in_round / (self.steps - 1))
        self.temperature = self.final_temperature**share

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs; logits and temperature are in the model's own."""
        return {
            "settings": self._settings(),
            "step_in_round": self.step_in_round,
            "rounds": self.rounds,
            "ticket": self.ticket,
            **self._record.state(),
            "last": copied(self._last),
            "checkpoint": self._checkpoint,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another stood; load the model's and the optimizers' state as well.

        Raises:
            ValueError: it had other tensors or settings.
        """
        record = self._record.loaded(state_dict)
        last = first_masks_of({"start": state_dict["last"]}, record.start)
        ours = self._settings()
        if state_dict["settings"] != ours:
            raise ValueError(
                f"`state_dict` must be of the same settings, {ours}; it has "
                f"{state_dict['settings']}."
            )
        checkpoint, ticket = state_dict["checkpoint"], state_dict["ticket"]
        keys = snapshot_keys(self.model)
        if checkpoint is not None and checkpoint.keys() != keys:
            raise ValueError(
                "`state_dict` must have a checkpoint of this model's tensors; others are "
                f"{listed(sorted(checkpoint.keys() ^ keys))}."
            )
        self.step_in_round, self.rounds = state_dict["step_in_round"], state_dict["rounds"]
        self._record, self._last, self._checkpoint = record, last, checkpoint
        for gate in self._gates():
            gate.hard = ticket

    def _warn_if_nothing_trains(self) -> None:
        gates = self._gates()
        moved = any(bool((gate.logits != gate.init).any()) for gate in gates)
        if not moved and any(bool(g.logits.grad.any()) for g in gates if g.logits.grad is not None):
            warnings.warn(
                "the logits of the gates have gradients and have not moved in two steps: an "
                "optimizer must hold `mask_parameters()`; one that was made before does not.",
                stacklevel=3,
            )

    def _settings(self) -> list[float]:
        """Return the final temperature, the steps of a round, and s0 of each mask."""
        return [self.final_temperature, self.steps, *(gate.init for gate in self._gates())]

    def _gates(self) -> list[SoftMask]:
        return list(self._by_name().values())

    def _by_name(self) -> dict[str, SoftMask]:
        names = set(self._names)
        found = {t.name: t.masks()[0] for t in masked_targets(self.model) if t.name in names}
        gates = {name: mask for name, mask in found.items() if isinstance(mask, SoftMask)}
        if gates.keys() != names:
            raise RuntimeError(
                "the gates of `model` must stay where they are; those of "
                f"{listed(sorted(names - gates.keys()))} were taken off or made hard."
            )
        return gates

    def _hard(self) -> dict[str, Tensor]:
        return {name: gate.logits > 0 for name, gate in self._by_name().items()}


def _is_sigmoid(module: Any) -> bool:
    return isinstance(module, SoftMask) and isinstance(module.kind, Sigmoid)


def _check_temperature(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`temperature` must be a finite number over 0; got {value!r}.")
    return value
