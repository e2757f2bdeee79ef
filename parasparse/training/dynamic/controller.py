"""Dynamic sparse training: dropping and growing connections during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.masks.kept_entries import KeptEntries
from parasparse.optim import (
    Optimizers,
    check_in_optimizer,
    each_optimizer,
    has_stepped,
    kind_of,
    momentum_of,
)
from parasparse.patterns import n_of_m
from parasparse.rules.types import Rules
from parasparse.rules.warn import warn_left_dense
from parasparse.schedules import Constant, as_every
from parasparse.sharding.dtensors import count_nonzero
from parasparse.sharding.fsdp import reshard
from parasparse.sharding.same_draws import same_draws, warn_if_alone
from parasparse.training.controller import Controller
from parasparse.training.dynamic.collected import Collected, collected
from parasparse.training.dynamic.compact_layer import CompactLayer
from parasparse.training.dynamic.layer import view
from parasparse.training.dynamic.start import Init, check_moves, first_masks
from parasparse.training.dynamic.update import Moves, next_masks
from parasparse.training.dynamic.view import needs_of
from parasparse.training.history import check_shapes, copied, loaded, saved, update_of
from parasparse.verbs.moving import check_may_resize
from parasparse.verbs.sparsify import apply

Move = str | Callable[..., Any]


class DynamicSparsity(Controller):
    """Drops and regrows connections of `model` during training; their number stays constant.

    An update computes the importance of each layer (`redistribution`), scaled so that the sum is 1.
    Each layer drops ceil(rate * connections) (`prune`); for layers with less than 20% zeros and
    more than average importance, the rate is at most their sparsity. The same number of connections
    is then grown (`growth`), divided among the layers by importance. No layer fills more than 99%
    of its free entries unless the budget needs it. Dropped and grown weights and their optimizer
    state are set to 0, but a growth that reads this state keeps it for the grown entries.

    Compact weights start with the entries that they have: pass `init="resume"`. Their values and
    their optimizer state move together, and no dense tensor is made. Growth by gradient computes
    the dense gradient one block of rows at a time. Moves that read momentum, and custom moves,
    raise ValueError.

    Args:
        model: changed in place.
        rules: as in `sparsify`. For a plain sparsity, `init` draws the first mask; a `Prune` makes
            its own. With patterns of units, whole units move; with `n_of_m`, entries move within
            their groups.
        optimizer: holds the masked parameters; or a sequence of optimizers that hold them.
        prune: "magnitude", "SET", "global_magnitude", or a function (see `moves`).
        growth: "momentum", "random", "gradient", "momentum_neuron", "global_momentum_growth", or a
            function.
        redistribution: "momentum", "magnitude", "nonzero", "none" (each layer regrows as many
            connections as it drops), or a function.
        prune_rate: share of connections that an update drops, in [0, 1], or `int -> float`.
        every: number of steps between updates, or `int -> bool`, such as `schedules.Every`; None:
            updates happen only when you call `update`.
        init: "constant", "linear" (Erdos-Renyi), "erk", "resume" (zeros are masked), or masks by
            name.

    Attributes:
        history: one `Update` for each change of masks.
        steps: number of `step()` calls so far.
        baseline_nonzero: number of connections of the network; units, for patterns of units.

    Raises:
        TypeError, ValueError, RuntimeError: `sparsify` refuses the rules, a layer would have no
            connection, a move is unknown, or a move reads momentum that the optimizer does not
            keep. The model is unchanged.

    Examples:
        >>> model = nn.Linear(20, 20)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> dst = DynamicSparsity(model, 0.9, optimizer, prune_rate=0.5, every=1)
        >>> model(torch.rand(4, 20)).square().mean().backward(); optimizer.step(); dst.step()
        >>> int((dst.history[0].churn > 0)), int((model.weight != 0).sum()) <= 40
        (1, True)

    Reference: Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without
        Losing Performance", 2019, arXiv:1907.04840, section 3. Differs: the budget is exact, and
        the prune rate stays constant after its schedule ends.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        optimizer: Optimizers,
        *,
        prune: Move = "magnitude",
        growth: Move = "momentum",
        redistribution: Move = "momentum",
        prune_rate: float | Callable[[int], float] = 0.5,
        every: int | Callable[[int], bool] | None = None,
        init: Init = "constant",
    ) -> None:
        each_optimizer(optimizer)  # raises if it is something else
        self.model, self.optimizer = model, optimizer
        self.moves = Moves.named(prune, growth, redistribution)
        self.prune_rate = prune_rate if callable(prune_rate) else Constant(_rate(prune_rate))
        _rate(self.prune_rate(0), "prune_rate(0)")
        self.every = None if every is None else as_every(every)
        self.steps, self._missing = 0, dict[str, int]()
        self._is_due, self._armed = False, ExitStack()
        self._gradients: Collected | None = None
        if self.every is None and "gradient" in self.moves.needs:
            raise ValueError(
                "`every` must not be None when a move reads the dense gradient, which is collected "
                "in the step before an update."
            )
        assigned, layers = first_masks(model, rules, init)
        self._layers = {layer.target.name: layer for layer in layers}
        check_in_optimizer(optimizer, [each.target for each in assigned], even_frozen=True)
        check_moves(self.moves, self._layers, optimizer)
        if not self.moves.keep_sizes:
            check_may_resize(model, [layer.target for layer in layers])
        self._is_next()  # if `every` raises, it does so before anything has changed
        warn_left_dense(assigned, stacklevel=2)
        apply(model, assigned)
        self._begin()

    def _begin(self) -> None:
        for layer in self._layers.values():
            layer.begin(dense_gradient=self._is_dense)
        self._start, self.history = copied(self._masks()), []
        self.baseline_nonzero = sum(
            count_nonzero(each.seen_mask()) for each in self._layers.values()
        )
        self._arm()

    def step(self) -> None:
        """Count a step, and update the masks if one is due; call it after `optimizer.step()`.

        If a GradScaler skips steps, the update waits for a step with finite gradients.

        Raises:
            RuntimeError: an update is due but the masked weights never had a gradient; or a mask
                was removed.
            ValueError: the prune rate leaves [0, 1], or a move returns an invalid mask or number.
                Masks, budget and step count are unchanged.
        """
        for layer in self._layers.values():
            layer.check()
        reshard(self.model)
        if self._is_dense:  # masked weights had a gradient too
            for layer in self._layers.values():
                layer.zero_masked()
        self._armed.close()  # several processes average the dense gradient here
        try:
            is_due = self._is_next()
            if is_due and self._has_seen():
                self._update(self.steps + 1)
                is_due = False
            self.steps, self._is_due = self.steps + 1, is_due
        finally:
            self._arm()

    def update(self) -> None:
        """Update the masks now, with the prune rate at the current step.

        Raises:
            RuntimeError, ValueError: see `step`; also if the optimizer skipped the step, or a move
                reads the dense gradient, which is collected only for `step`.
        """
        reshard(self.model)
        if self._is_armed:
            raise RuntimeError(
                "`update` cannot be called when a move reads the dense gradient, because this is "
                "collected only for the updates that `every` announces. Call only `step`."
            )
        if not self._has_seen():
            raise RuntimeError(
                "the optimizer has not stepped (a GradScaler may have skipped it). Call `update` "
                "after a step with finite gradients."
            )
        self._update(self.steps)

    def at_end_of_epoch(self) -> None:
        """Update the masks now, as `update` does."""
        self.update()

    def close(self) -> None:
        """Stop collecting gradients, so another controller can take over."""
        self._armed.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state; save those of the model (with masks) and optimizer too."""
        return {
            "steps": self.steps, "is_due": self._is_due, "missing": tuple(self._missing.items()),
            "baseline_nonzero": self.baseline_nonzero, **saved(self.history, self._start),
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises ValueError if it is for other tensors, or for a network with another number of
        connections than the rules of this controller ask for.
        """
        history, start = loaded(state_dict, self._start)
        self._check_number(state_dict["baseline_nonzero"])
        names = ("steps", "is_due", "missing", "baseline_nonzero")
        steps, is_due, missing, baseline = (state_dict[name] for name in names)
        self.history, self._start, self._missing = history, start, dict(missing)
        self.steps, self._is_due, self.baseline_nonzero = steps, is_due, baseline
        self._arm()

    def _check_number(self, saved: int) -> None:
        if saved != self.baseline_nonzero:
            raise ValueError(
                f"the state must be of a network with {self.baseline_nonzero:,} connections, as "
                f"many as this controller's rules keep; it has {saved:,}. Create the controller "
                "with the sparsity of the saved run."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_armed": None, "_gradients": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _armed=ExitStack())
        self._arm()

    @property
    def _is_dense(self) -> bool:
        return not self.moves.needs.isdisjoint({"momentum", "state"})

    @property
    def _is_armed(self) -> bool:
        return "gradient" in self.moves.needs

    def _is_next(self) -> bool:
        """Whether the next step is an update."""
        return self._is_due or (self.every is not None and bool(self.every(self.steps + 1)))

    def _update(self, step: int) -> None:
        check_shapes(self._masks(), self._start)
        for layer in self._layers.values():
            layer.check_state(self.optimizer)
        for layer in self._layers.values():
            layer.zero_masked()
        rate = _rate(self.prune_rate(step), f"prune_rate({step})")
        gradients = None if self._gradients is None else self._gradients.dense
        seen = view(
            self._layers, self.optimizer, gradients, rate, self.baseline_nonzero, self.model
        )
        patterns = {name: layer.pattern for name, layer in self._layers.items()}
        groups = {name: each for name, each in patterns.items() if isinstance(each, n_of_m)}
        warn_if_alone(self.model)
        with torch.no_grad(), same_draws(self.model):
            masks, missing = next_masks(seen, self.moves, self._missing, groups, self._growths())
        new = {name: layer.entries(masks[name]) for name, layer in self._layers.items()}
        change = update_of(step, self._masks(), new, self._start, sum(missing.values()))
        # Growth by momentum keeps the momentum of the grown entries.
        keep = not needs_of(self.moves.growth).isdisjoint({"momentum", "state"})
        for name, layer in self._layers.items():
            layer.set_mask(new[name], self.optimizer, keep_state_of_grown=keep)
        self._missing = {name: count for name, count in missing.items() if count}
        self.history.append(change)

    def _growths(self) -> dict[str, Callable[[Tensor, int], KeptEntries]]:
        """Return the functions that grow compact layers, by name."""
        uses = {} if self._gradients is None else self._gradients.uses
        groups = {} if self._gradients is None else self._gradients.groups
        return {
            name: partial(
                layer.grown, growth=self.moves.growth, uses=uses.get(name), group=groups.get(name)
            )
            for name, layer in self._layers.items()
            if isinstance(layer, CompactLayer)
        }  # fmt: skip

    def _has_seen(self) -> bool:
        """Whether momentum and gradients are available; not so if a GradScaler skipped the step.

        Raises:
            RuntimeError: the masked weights never had a gradient.
        """
        parameters = [p for layer in self._layers.values() for p in layer.parameters]
        missing = "momentum" in self.moves.needs and all(
            momentum_of(self.optimizer, parameter) is None for parameter in parameters
        )
        if missing and any(has_stepped(self.optimizer, parameter) for parameter in parameters):
            raise RuntimeError(
                f"the moves read a momentum, and the state of {kind_of(self.optimizer)} has "
                "none under a known name. Add the name to parasparse.optim.MOMENTA, or choose "
                "moves that read no momentum."
            )
        if self._is_armed:
            assert self._gradients is not None
            missing = missing or self._gradients.is_empty()
        if missing and all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "the masked weights have had no gradient yet. Call `backward` and "
                "`optimizer.step()` before an update."
            )
        return not missing and (self._gradients is None or self._gradients.is_finite())

    def _arm(self) -> None:
        """Start to collect the dense gradient if the next step is an update that reads it."""
        self._armed.close()
        self._gradients = None
        if self._is_armed and self._is_next():
            self._gradients = self._armed.enter_context(collected(self.model, self._layers))

    def _masks(self) -> dict[str, Tensor | KeptEntries]:
        return {name: layer.mask for name, layer in self._layers.items()}


def _rate(value: Any, argument: str = "prune_rate") -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{argument}` must be a number in [0, 1]; got {value!r:.60}.") from error
    if not 0.0 <= rate <= 1.0:  # false for NaN as well
        raise ValueError(f"`{argument}` must be in [0, 1]; got {value!r}.")
    return rate
