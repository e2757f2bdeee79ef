"""What the moves of dynamic sparse training see: a view of the controller, and what they need."""

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
    """The network at one update, layer by layer; all dicts are by plain name of the weight.

    Attributes:
        optimizer: the very one; `optimizer.state[weight]` is the state of a weight.
        weights: 0 where the mask is 0. Each is the Parameter that the optimizer holds; a complex
            tensor for a real/imag pair, the size of each unit where a pattern of units counts.
            Where processes share weights, DTensors, and so are masks, momentum and gradient.
        masks: bool copies. Moves for all layers at once write new ones here.
        prune_rate: share of its connections that a layer loses now.
        baseline_nonzero: connections of the network, before and after each update.
        model: `modules` holds it.
        name2nonzeros: connections of each layer before the update.
        name2zeros: entries that are none.
        name2variance: importance of each layer, summing to 1; after redistribution.
        name2prune_rate: `prune_rate`, lower for layers that are nearly full; after redistribution.
        name2removed: connections that the layer lost; after pruning.
        momentum: what `get_momentum_for_weight` returns.
        gradient: what `get_gradient_for_weight` returns.
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
        """Connections of all layers before the update."""
        return sum(self.name2nonzeros.values())

    @property
    def total_zero(self) -> int:
        """Entries of all layers that are none."""
        return sum(self.name2zeros.values())

    @property
    def total_removed(self) -> int:
        """Connections that all layers lost."""
        return sum(self.name2removed.values())

    @property
    def modules(self) -> list[Any]:
        """The model, whose `named_parameters()` has the names that `masks` has."""
        return [_PlainNames(self.model, self.weights)]

    def get_momentum_for_weight(self, weight: Tensor) -> Tensor:
        """Return the momentum that the optimizer keeps for `weight`, masked entries included.

        The momentum buffer, or exp_avg / (sqrt(exp_avg_sq) + 1e-8); 0 where no gradient came by.
        """
        return self.momentum(weight)

    def get_gradient_for_weight(self, weight: Tensor) -> Tensor:
        """Return the gradient of this step, masked entries included: "gradient" must be needed."""
        return self.gradient(weight)


@dataclass(frozen=True)
class _PlainNames:
    """A masked model that calls its weights as it did when it was dense."""

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
    """Say what a move of your own reads, so that nothing else is kept up for it.

    Args:
        what: "weights": weights and masks alone; "gradient": the dense gradient of the step before
            the update; "momentum": `get_momentum_for_weight`; "state": any state of the optimizer,
            which is what a function without this decorator gets. With the last two, gradients of
            masked entries reach the optimizer at every step.

    Raises:
        ValueError: it is none of these.

    Examples:
        >>> @needs("weights")
        ... def number_of_inputs(masking, name, weight, mask): return weight.shape[1]
        >>> sorted(needs_of(number_of_inputs)), sorted(needs_of(lambda masking: 0))
        (['weights'], ['state'])
    """
    unknown = [word for word in what if word not in get_args(Need)]
    if unknown or not what:
        raise ValueError(f"`what` must be of {listed(get_args(Need))}; got {listed(what)}.")

    def mark(move: _Move) -> _Move:
        move.needs = frozenset(what)  # type: ignore[attr-defined]
        return move

    return mark


def needs_of(move: Callable[..., Any]) -> frozenset[Need]:
    """Return what `move` reads: see `needs`."""
    if isinstance(move, partial) and not hasattr(move, "needs"):
        return needs_of(move.func)
    found: frozenset[Need] = getattr(move, "needs", frozenset({"state"}))
    return found
