"""Dynamic sparse training: connections are dropped and others grown while the network trains."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.optim import check_held, momentum_of
from parasparse.rules.types import Rules
from parasparse.schedules import Constant, as_every
from parasparse.sharding.dtensors import count_nonzero
from parasparse.sharding.fsdp import reshard
from parasparse.sharding.same_draws import same_draws, warn_if_alone
from parasparse.training.controller import Record, Recorded
from parasparse.training.dynamic.layer import view_of
from parasparse.training.dynamic.start import Init, check_moves, first_masks
from parasparse.training.dynamic.update import Moves, next_masks
from parasparse.training.dynamic.view import needs_of
from parasparse.verbs.dense_gradients import DenseGradients, collecting
from parasparse.verbs.sparsify import apply

Move = str | Callable[..., Any]


class DynamicSparsity(Recorded):
    """Moves the connections of `model` while it trains; the network keeps exactly as many.

    One update: each layer's importance (`redistribution`), normalised to sum 1; each layer loses
    ceil(rate * connections) (`prune`), a layer with less than 20 % zeros and more than average
    importance at most at the rate of its sparsity; what all lost grows again (`growth`), shared out
    by importance. No layer takes more than 0.99 of what is free in it, unless the budget needs it.
    What dropped and what grew is 0 then, in the weights and in the optimizer's state, except that
    growth that reads this state keeps it for what it grows.

    Args:
        model: changed in place.
        rules: as for `sparsify`. A sparsity alone is drawn as `init` says; a `Prune` says itself
            how. Patterns of units move units, `n_of_m` moves within its groups.
        optimizer: holds the masked parameters.
        prune: "magnitude", "SET", "global_magnitude", or a function: see `moves`.
        growth: "momentum", "random", "gradient", "momentum_neuron", "global_momentum_growth", or a
            function.
        redistribution: "momentum", "magnitude", "nonzero", "none" (each layer regrows what it
            loses), or a function.
        prune_rate: share of connections that an update drops, in [0, 1]; or `int -> float`.
        every: update at each so-many-th step; or `int -> bool`, such as `schedules.Every`; None:
            only `update()` does.
        init: "constant", "linear" (Erdos-Renyi), "erk", "resume" (what is 0 is masked), or masks by
            name.

    Attributes:
        history: an `Update` for each.
        steps: how many times `step()` has been called.
        baseline_nonzero: how many connections (units, where these count) the network has.

    Raises:
        TypeError, ValueError, RuntimeError: as `sparsify`; a layer without a connection; an
            optimizer without momentum where a move reads it; an unknown move. The model is as it
            was.

    Examples:
        >>> model = nn.Linear(20, 20)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> dst = DynamicSparsity(model, 0.9, optimizer, prune_rate=0.5, every=1)
        >>> model(torch.rand(4, 20)).square().mean().backward(); optimizer.step(); dst.step()
        >>> int((dst.history[0].churn > 0)), int((model.weight != 0).sum()) <= 40
        (1, True)

    Reference: Dettmers & Zettlemoyer, "Sparse Networks from Scratch: Faster Training without
        Losing Performance", 2019, arXiv:1907.04840, section 3. Differs: the budget is exact, the
        prune rate stays put at its end.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        optimizer: torch.optim.Optimizer,
        *,
        prune: Move = "magnitude",
        growth: Move = "momentum",
        redistribution: Move = "momentum",
        prune_rate: float | Callable[[int], float] = 0.5,
        every: int | Callable[[int], bool] | None = None,
        init: Init = "constant",
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"`optimizer` must be one of torch's kind; got {optimizer!r:.60}.")
        self.model, self.optimizer = model, optimizer
        self.moves = Moves.named(prune, growth, redistribution)
        self.prune_rate = prune_rate if callable(prune_rate) else Constant(_rate(prune_rate))
        _rate(self.prune_rate(0), "prune_rate(0)")
        self.every = None if every is None else as_every(every)
        self.steps, self._missing = 0, dict[str, int]()
        self._is_due, self._armed = False, ExitStack()
        self._gradients: DenseGradients | None = None
        if self.every is None and "gradient" in self.moves.needs:
            raise ValueError(
                "`every` must say when updates are, so that the dense gradient is collected in the "
                "step before; got None."
            )
        assigned, layers = first_masks(model, rules, init)
        self._layers = {layer.target.name: layer for layer in layers}
        check_held(optimizer, [each.target for each in assigned], even_frozen=True)
        check_moves(self.moves, self._layers, optimizer)
        self._is_next()  # a function that fails does so before anything has changed
        apply(model, assigned)
        for layer in layers:
            layer.module.dense_gradient = self._is_dense
            layer.module.zeroed_in_place = frozenset(map(id, layer.parameters))
            layer.zero_masked()
        self._record = Record(self._masks())
        self.baseline_nonzero = sum(count_nonzero(layer.seen_mask()) for layer in layers)
        self._arm()

    def step(self) -> None:
        """Count a step, and update the masks if it is time; call it after `optimizer.step()`.

        An update waits for a step with finite gradients where a GradScaler skips some.

        Raises:
            RuntimeError: an update is due and no gradient has come by yet.
            ValueError: the prune rate leaves [0, 1]; a move returns what it must not. Masks, budget
                and the count of steps are as they were.
        """
        for layer in self._layers.values():
            layer.check_masked()
        reshard(self.model)
        if self._is_dense:  # masked weights had a gradient too
            for layer in self._layers.values():
                layer.zero_masked()
        self._armed.close()  # where several processes train, they average here
        try:
            is_due = self._is_next()
            if is_due and self._has_seen():
                self._update(self.steps + 1)
                is_due = False
            self.steps, self._is_due = self.steps + 1, is_due
        finally:
            self._arm()

    def update(self) -> None:
        """Update the masks now; the prune rate is that of the steps counted so far.

        Raises:
            RuntimeError, ValueError: as `step`; a move reads the dense gradient, which is collected
                for the updates of `step` only.
        """
        reshard(self.model)
        if self._is_armed:
            raise RuntimeError(
                "`update` must be left to `step` when a move reads the dense gradient, which is "
                "collected in the step before an update only."
            )
        if not self._has_seen():
            raise RuntimeError(
                "an update must come after an `optimizer.step()`, which was skipped."
            )
        self._update(self.steps)

    def at_end_of_epoch(self) -> None:
        """Update the masks now, as `update` does."""
        self.update()

    def close(self) -> None:
        """Collect no gradients any more: another controller takes over, or none."""
        self._armed.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs; the masks are in the model's own."""
        return {
            "steps": self.steps,
            "is_due": self._is_due,
            "missing": tuple(self._missing.items()),
            "baseline_nonzero": self.baseline_nonzero,
            **self._record.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another stood; load the model's and the optimizer's state as well.

        Raises:
            ValueError: it had other tensors.
        """
        record = self._record.loaded(state_dict)
        self.steps, self._is_due = state_dict["steps"], state_dict["is_due"]
        self._missing = dict(state_dict["missing"])
        self.baseline_nonzero = state_dict["baseline_nonzero"]
        self._record = record
        self._arm()

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
        for layer in self._layers.values():
            layer.zero_masked()
        rate = _rate(self.prune_rate(step), f"prune_rate({step})")
        view = view_of(
            self._layers, self.optimizer, self._gradients, rate, self.baseline_nonzero, self.model
        )
        groups = {n: layer.groups for n, layer in self._layers.items() if layer.groups is not None}
        warn_if_alone(self.model)
        with torch.no_grad(), same_draws(self.model):
            masks, missing = next_masks(view, self.moves, self._missing, groups)
        new = {name: layer.entries(masks[name]) for name, layer in self._layers.items()}
        change = self._record.change(step, self._masks(), new, sum(missing.values()))
        # Growth by momentum goes on with what it grew by.
        keep = not needs_of(self.moves.growth).isdisjoint({"momentum", "state"})
        for name, layer in self._layers.items():
            layer.set_mask(new[name], self.optimizer, keep_state_of_grown=keep)
        self._missing = {name: count for name, count in missing.items() if count}
        self.history.append(change)

    def _has_seen(self) -> bool:
        """Whether the moves find what they read; if a GradScaler skipped the step, they do not.

        Raises:
            RuntimeError: no gradient has come by yet.
        """
        parameters = [p for layer in self._layers.values() for p in layer.parameters]
        missing = "momentum" in self.moves.needs and all(
            momentum_of(self.optimizer, parameter) is None for parameter in parameters
        )
        probes: list[Tensor | None] = [None]
        if self._is_armed:
            assert self._gradients is not None
            probes = list(self._gradients.values())
            missing = missing or all(probe is None for probe in probes)
        if missing and all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "an update must come after a backward and an `optimizer.step()`; the masked "
                "weights have had no gradient yet."
            )
        finite = not any(
            count_nonzero(~_values(probe).isfinite()) for probe in probes if probe is not None
        )
        return finite and not missing

    def _arm(self) -> None:
        """Collect the dense gradient if the next step is an update that reads it."""
        self._armed.close()
        self._gradients = None
        if self._is_armed and self._is_next():
            targets = [layer.target for layer in self._layers.values()]
            self._gradients = self._armed.enter_context(collecting(self.model, targets))

    def _masks(self) -> dict[str, Tensor]:
        return {name: layer.mask for name, layer in self._layers.items()}


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def _rate(value: Any, argument: str = "prune_rate") -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{argument}` must be a number in [0, 1]; got {value!r:.60}.") from error
    if not 0.0 <= rate <= 1.0:  # false for NaN as well
        raise ValueError(
            f"`{argument}` must be in [0, 1], the share of connections that an update drops; got "
            f"{value!r}."
        )
    return rate
