"""The view of the network that the moves of dynamic sparse training get."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from parasparse.sharding.dtensors import count_nonzero
from parasparse.text import listed

Need = Literal["weights", "gradient", "momentum", "state"]
_Move = TypeVar("_Move", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Masking:
    """The network at one update; all dicts are by the plain names of the weights.

    Attributes:
        optimizer: the optimizer; `optimizer.state[weight]` is the state of a weight. A sequence of
            optimizers if the controller was given one.
        weights: the Parameters, 0 where the mask is 0; for a real/imag pair a complex tensor, and
            with a pattern of units the size of each unit. If weights are sharded, weights, masks,
            momentum and gradient are DTensors.
        masks: copies, bool. Moves for all layers at once write new masks here.
        prune_rate: share of its connections that each layer drops.
        baseline_nonzero: number of connections of the network before and after each update.
        model: the model.
        momentum: implements `get_momentum_for_weight`.
        gradient: implements `get_gradient_for_weight`.
        name2nonzeros: number of connections of each layer before the update.
        name2zeros: number of the other entries.
        name2variance: importance of each layer, with sum 1; set by redistribution.
        name2prune_rate: `prune_rate`, lower for nearly full layers; set by redistribution.
        name2removed: number of dropped connections; set by pruning.
    """

    optimizer: Any
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    prune_rate: float
    baseline_nonzero: int
    model: nn.Module
    momentum: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    name2nonzeros: dict[str, int] = field(init=False)
    name2zeros: dict[str, int] = field(init=False)
    name2variance: dict[str, float] = field(default_factory=dict, init=False)
    name2prune_rate: dict[str, float] = field(default_factory=dict, init=False)
    name2removed: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        kept = {name: count_nonzero(mask) for name, mask in self.masks.items()}
        zeros = {name: mask.numel() - kept[name] for name, mask in self.masks.items()}
        object.__setattr__(self, "name2nonzeros", kept)
        object.__setattr__(self, "name2zeros", zeros)

    @property
    def total_nonzero(self) -> int:
        """Number of connections of all layers before the update."""
        return sum(self.name2nonzeros.values())

    @property
    def total_zero(self) -> int:
        """Number of all other entries."""
        return sum(self.name2zeros.values())

    @property
    def total_removed(self) -> int:
        """Number of connections that all layers dropped."""
        return sum(self.name2removed.values())

    @property
    def modules(self) -> list[Any]:
        """The model, with the names of `masks` in its `named_parameters()`."""
        return [_PlainNames(self.model, self.weights)]

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        """Return the optimizer's momentum of `weight`, including masked entries.

        This is the momentum buffer, exp_avg / (sqrt(exp_avg_sq) + 1e-8), or 0 before any gradient.
        """
        return self.momentum(weight)

    def get_gradient_for_weight(self, weight: Tensor) -> Tensor:
        """Return the gradient of this step, including masked entries; needs("gradient")."""
        return self.gradient(weight)


@dataclass(frozen=True)
class _PlainNames:
    """A masked model whose weights have the names of the dense model."""

    _model: nn.Module
    _weights: dict[str, Tensor]

    def named_parameters(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()
        own = {id(weight) for weight in self._weights.values()}
        others = self._model.named_parameters(*args, **keywords)
        yield from ((name, parameter) for name, parameter in others if id(parameter) not in own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def needs(*what: Need) -> Callable[[_Move], _Move]:
    """Declare what your own move reads, so the controller provides nothing else.

    Args:
        what: "weights": only weights and masks; "gradient": the dense gradient of the step before
            the update; "momentum": `get_momentum_for_weight`; "state": any state of the optimizer,
            the default without this decorator. With the last two, gradients of masked entries reach
            the optimizer at every step.

    Raises:
        ValueError: `what` is empty or contains another word.

    Examples:
        >>> @needs("weights")
        ... def number_of_inputs(masking, name, weight, mask): return weight.shape[1]
        >>> sorted(needs_of(number_of_inputs)), sorted(needs_of(lambda masking: 0))
        (['weights'], ['state'])
    """
    unknown = [word for word in what if word not in get_args(Need)]
    if unknown or not what:
        raise ValueError(f"`what` must be from {listed(get_args(Need))}; got {listed(what)}.")

    def mark(move: _Move) -> _Move:
        move.needs = frozenset(what)  # type: ignore[attr-defined]
        return move

    return mark


def needs_of(move: Callable[..., Any]) -> frozenset[Need]:
    """Return the words that `needs` declared for `move`, "state" by default."""
    if isinstance(move, partial) and not hasattr(move, "needs"):
        return needs_of(move.func)
    found: frozenset[Need] = getattr(move, "needs", frozenset({"state"}))
    return found
