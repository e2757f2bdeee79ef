"""Dynamic sparse training: connections are dropped and others grown while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from parasparse._checks import check_sparsity, listed
from parasparse._units import has_units
from parasparse.contexts import DenseGradients, dense_gradients
from parasparse.optim import keeps_momentum, momentum_of
from parasparse.patterns import unstructured
from parasparse.schedules import Constant, Every
from parasparse.training.gradual import check_held
from parasparse.training.history import Update, copied, update_of
from parasparse.training.layer import Layer
from parasparse.training.masking import Masking, need_of
from parasparse.training.moves import GROWTH_SCORES, no_redistribution
from parasparse.training.start import Init, first_masks
from parasparse.training.update import Moves, next_masks
from parasparse.transforms import attach

Move = str | Callable[..., Any]


class DynamicSparsity:
    """Moves the connections of `model` while it trains; the network keeps exactly as many.

    One update: each layer's importance (`redistribution`), normalised to sum 1; each layer loses
    ceil(rate * connections) (`prune`), a layer with less than 20 % zeros and more than average
    importance at most at the rate of its sparsity; what all lost grows again (`growth`), shared out
    by importance. No layer takes more than 0.99 of what is free in it, unless the budget needs it.
    What dropped and what grew starts at 0, in the weights and in the optimizer's state, except that
    growth by the optimizer's state keeps the state of what it grows.

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
        rules: Any,
        optimizer: torch.optim.Optimizer,
        *,
        prune: Move = "magnitude",
        growth: Move = "momentum",
        redistribution: Move = "momentum",
        prune_rate: float | Callable[[int], float] = 0.5,
        every: int | Callable[[int], bool] | None = None,
        init: Init = "constant",
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.moves = Moves.named(prune, growth, redistribution)
        self.prune_rate = prune_rate if callable(prune_rate) else Constant(_rate(prune_rate))
        _rate(self.prune_rate(0), "prune_rate(0)")
        self.every = Every(every) if isinstance(every, int) else every
        self.steps, self.history, self._missing = 0, list[Update](), dict[str, int]()
        if self.every is None and "gradient" in self.moves.needs:
            raise ValueError(
                "`every` must say when updates are, so that the dense gradient is collected in the "
                "step before; got None."
            )
        steps, layers = first_masks(model, rules, init)
        self._layers = {layer.target.name: layer for layer in layers}
        check_held(optimizer, [step.target for step in steps], frozen=True)
        _check_patterns(self.moves, self._layers)
        _check_momentum(self.moves, self._layers, optimizer)
        attach(steps)
        for layer in layers:
            layer.module.dense_gradient = self._is_dense
            layer.zero_masked()
        self._start = copied(self._masks())
        self.baseline_nonzero = sum(int(layer.seen_mask().count_nonzero()) for layer in layers)
        self._is_due = False
        self._armed = ExitStack()
        self._gradients: DenseGradients | None = None
        self._arm()

    def step(self) -> None:
        """Count a step, and update the masks if it is time; call it after `optimizer.step()`.

        Raises:
            RuntimeError: an update is due and no gradient has come by yet.
            ValueError: the prune rate leaves [0, 1]; a move returns what it must not. Masks, budget
                and the count of steps are as they were.
        """
        if self._is_dense:  # masked weights had a gradient too
            for layer in self._layers.values():
                layer.zero_masked()
        self._armed.close()  # where several processes train, they average here
        step = self.steps + 1
        is_due = self._is_due or (self.every is not None and self.every(step))
        if is_due and self._is_finite():
            self._update(step)
            is_due = False
        self.steps, self._is_due = step, is_due
        self._arm()

    def update(self) -> None:
        """Update the masks now.

        Raises:
            RuntimeError, ValueError: as `step`.
        """
        self._update(self.steps)

    def at_end_of_epoch(self) -> None:
        """Update the masks now, as `update` does."""
        self.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs; the masks are in the model's own."""
        return {
            "steps": self.steps,
            "is_due": self._is_due,
            "missing": dict(self._missing),
            "baseline_nonzero": self.baseline_nonzero,
            "history": [asdict(update) for update in self.history],
            "start": copied(self._start),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another stood; load the model's and the optimizer's state as well.

        Raises:
            ValueError: it had other tensors.
        """
        start = state_dict["start"]
        if start.keys() != self._start.keys():
            raise ValueError(
                f"`state_dict` must be of the same rules; it has the tensors {listed(start)}, this "
                f"controller {listed(self._start)}."
            )
        self.steps, self._is_due = state_dict["steps"], state_dict["is_due"]
        self._missing = dict(state_dict["missing"])
        self.baseline_nonzero = state_dict["baseline_nonzero"]
        self.history = [Update(**update) for update in state_dict["history"]]
        self._start = {n: mask.to(self._start[n].device).clone() for n, mask in start.items()}
        self._arm()

    @property
    def _is_dense(self) -> bool:
        return not self.moves.needs.isdisjoint({"momentum", "state"})

    def _update(self, step: int) -> None:
        for layer in self._layers.values():
            layer.zero_masked()
        view = self._view(_rate(self.prune_rate(step), f"prune_rate({step})"))
        self._check_seen()
        groups = {n: layer.groups for n, layer in self._layers.items() if layer.groups is not None}
        masks, missing = next_masks(view, self.moves, self._missing, groups)
        before = copied(self._masks())
        keep = need_of(self.moves.growth) in ("momentum", "state")
        for name, layer in self._layers.items():
            layer.set_mask(layer.entries(masks[name]), self.optimizer, keep_state_of_grown=keep)
        self._missing = {name: number for name, number in missing.items() if number}
        shortfall = sum(missing.values())
        self.history.append(update_of(step, before, self._masks(), self._start, shortfall))

    def _view(self, rate: float) -> Masking:
        weights = {name: layer.seen_weight() for name, layer in self._layers.items()}
        layers = {id(weights[name]): layer for name, layer in self._layers.items()}

        def momentum(weight: Tensor) -> Tensor:
            found = layers[id(weight)].of_each(lambda p: momentum_of(self.optimizer, p))
            return torch.zeros_like(weight) if found is None else found

        def gradient(weight: Tensor) -> Tensor:
            layer = layers[id(weight)]
            assert self._gradients is not None
            found = self._gradients[layer.target.name]
            if found is None:
                return torch.zeros_like(weight)
            return layer.seen([found])

        return Masking(
            optimizer=self.optimizer,
            weights=weights,
            masks={name: layer.seen_mask() for name, layer in self._layers.items()},
            prune_rate=rate,
            baseline_nonzero=self.baseline_nonzero,
            model=self.model,
            momentum=momentum,
            gradient=gradient,
        )

    def _check_seen(self) -> None:
        """Raise RuntimeError if no gradient has come by, which the moves read."""
        layers = self._layers.values()
        if "gradient" in self.moves.needs and self._gradients is None:
            raise RuntimeError(
                "`update` must be left to `step` when a move reads the dense gradient, which is "
                "collected in the step before an update only."
            )
        states = [self.optimizer.state.get(p) for layer in layers for p in layer.parameters]
        probes = [] if self._gradients is None else list(self._gradients.values())
        state_missing = self._is_dense and not any(states)
        probe_missing = "gradient" in self.moves.needs and all(g is None for g in probes)
        if state_missing or probe_missing:
            raise RuntimeError(
                "an update must come after a backward and an `optimizer.step()`; the masked "
                "weights have had no gradient yet."
            )

    def _arm(self) -> None:
        """Collect the dense gradient if the next step is an update that reads it."""
        self._armed.close()
        self._gradients = None
        if "gradient" not in self.moves.needs or self.every is None:
            return
        if self._is_due or self.every(self.steps + 1):
            self._gradients = self._armed.enter_context(dense_gradients(self.model))

    def _is_finite(self) -> bool:
        grads = [] if self._gradients is None else list(self._gradients.values())
        return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)

    def _masks(self) -> dict[str, Tensor]:
        return {name: layer.mask for name, layer in self._layers.items()}


def _rate(value: Any, argument: str = "prune_rate") -> float:
    try:
        return check_sparsity(value, argument)
    except (TypeError, ValueError) as error:
        error.add_note("the prune rate is the share of connections that an update drops")
        raise


def _check_patterns(moves: Moves, layers: Mapping[str, Layer]) -> None:
    bound = {name: layer for name, layer in layers.items() if layer.pattern is not unstructured}
    if bound and (moves.redistribution is not no_redistribution or moves.grow_globally):
        raise ValueError(
            '`redistribution` must be "none", and growth local, with patterns, whose counts differ '
            f"from layer to layer; {listed(bound)} have one."
        )
    groups = [name for name, layer in bound.items() if not has_units(layer.pattern)]
    if groups and moves.growth not in GROWTH_SCORES:
        raise ValueError(
            '`growth` must be "random", "momentum" or "gradient" where groups keep their n; '
            f"{listed(groups)} have such a pattern."
        )


def _check_momentum(
    moves: Moves, layers: Mapping[str, Layer], optimizer: torch.optim.Optimizer
) -> None:
    without = [
        name
        for name, layer in layers.items()
        if not all(keeps_momentum(optimizer, parameter) for parameter in layer.parameters)
    ]
    if without and "momentum" in moves.needs:
        raise ValueError(
            f"`optimizer` must keep a momentum, which the moves read; {type(optimizer).__name__} "
            f'keeps none for {listed(without)}. Give it one (`momentum=0.9`), or use "gradient" or '
            '"random" growth and "magnitude", "nonzero" or "none" redistribution.'
        )
