"""One masked tensor as the moves of dynamic sparse training see it: by entry or by unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parasparse.attach.pair_stack import joined
from parasparse.masks.apply import apply_mask_
from parasparse.masks.kept_entries import KeptEntries
from parasparse.masks.mask import Mask
from parasparse.optim import (
    Optimizers,
    check_clearable,
    momentum_of,
    parameters_of,
    zero_entries,
)
from parasparse.patterns import Pattern, unstructured
from parasparse.patterns.blocks_channels_heads import has_units
from parasparse.sharding.dtensors import fill_, full_tensor, laid_out_like
from parasparse.targets.tensors import Target
from parasparse.training.dynamic.compact_layer import CompactLayer
from parasparse.training.dynamic.view import Masking
from parasparse.training.history import masks_lost


@dataclass(frozen=True, eq=False)
class Layer:
    """A masked tensor and the pattern of its mask.

    With a pattern of units, moves drop and grow units; groups of `n_of_m` keep their n.
    """

    target: Target
    pattern: Pattern = unstructured

    @property
    def parameters(self) -> list[Tensor]:
        """The Parameter, or the real and the imaginary one of a pair."""
        return parameters_of(self.target)

    @property
    def module(self) -> Mask:
        """The module that masks it; raises RuntimeError if it was removed or replaced."""
        modules = self.target.masks()
        if len(modules) != 1 or not isinstance(modules[0], Mask):
            raise masks_lost([self.target.name])
        return modules[0]

    @property
    def mask(self) -> Tensor:
        """The mask of all entries, sharded like the weight."""
        mask = self.module.mask
        assert mask is not None
        return laid_out_like(mask, self.parameters[0])

    def check(self) -> None:
        """Raise RuntimeError if the mask was removed or replaced."""
        _ = self.module

    def begin(self, *, dense_gradient: bool) -> None:
        """Set masked weights to 0 and keep them so; `dense_gradient`: they have a gradient too."""
        self.module.dense_gradient = dense_gradient
        self.module.zeroed_in_place = frozenset(map(id, self.parameters))
        self.zero_masked()

    def check_state(self, optimizer: Optimizers) -> None:
        """Raise TypeError if the state of the optimizer cannot be set to 0."""
        check_clearable(optimizer, self.parameters)

    def seen_mask(self) -> Tensor:
        """Return a copy of the mask, by unit with a pattern of units."""
        if has_units(self.pattern):
            return self.pattern.pool(full_tensor(self.mask).float()) > 0
        return self.mask.clone()

    def seen_weight(self) -> Tensor:
        """Return the weight for moves: the Parameter itself if possible."""
        parameters = self.parameters
        plain = len(parameters) == 1 and not has_units(self.pattern)
        return parameters[0] if plain else self.seen([p.detach() for p in parameters])

    def seen(self, parts: Sequence[Tensor]) -> Tensor:
        """Return values of the Parameters for moves: a pair joined, units pooled."""
        values = parts[0] if len(parts) == 1 else joined(*parts)
        return self.pattern.pool(full_tensor(values).abs()) if has_units(self.pattern) else values

    def of_each(self, read: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Return `read` of each Parameter for moves; None if `read` returns None for all."""
        parameters = self.parameters
        found = [read(parameter) for parameter in parameters]
        if all(part is None for part in found):
            return None
        both = zip(parameters, found, strict=True)
        return self.seen([torch.zeros_like(p) if part is None else part for p, part in both])

    def entries(self, seen: Tensor) -> Tensor:
        """Return the mask of all entries for `seen`, a mask that moves returned."""
        if not has_units(self.pattern):
            return seen
        return laid_out_like(self.pattern.spread(seen, self.mask.shape), self.mask)

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Set masked weights to 0."""
        mask = self.mask
        for parameter in self.parameters:
            apply_mask_(parameter, mask)

    @torch.no_grad()
    def set_mask(
        self, mask: Tensor | KeptEntries, optimizer: Optimizers, *, keep_state_of_grown: bool
    ) -> None:
        """Set the mask; set changed weights and their optimizer state to 0."""
        assert isinstance(mask, Tensor)
        before = self.mask.clone()
        self.module.mask_(mask)
        changed = before ^ mask
        for parameter in self.parameters:
            fill_(parameter, changed, 0.0)
            entries = changed & before if keep_state_of_grown else changed
            zero_entries(optimizer, parameter, entries, weights_too=True)


def view(
    layers: Mapping[str, Layer | CompactLayer],
    optimizer: Optimizers,
    gradients: Mapping[str, Tensor | None] | None,
    prune_rate: float,
    baseline_nonzero: int,
    model: nn.Module,
) -> Masking:
    """Return the view of `layers` for moves; `gradients` are dense, or None if not collected."""
    weights = {name: layer.seen_weight() for name, layer in layers.items()}
    names = {id(weight): name for name, weight in weights.items()}

    def name_of(weight: Tensor) -> str:
        if id(weight) not in names:
            raise ValueError("`weight` must be one of `masking.weights`; got another tensor.")
        return names[id(weight)]

    def layer_of(weight: Tensor) -> Layer:
        layer = layers[name_of(weight)]
        assert isinstance(layer, Layer)  # moves of compact weights read only values
        return layer

    def momentum(weight: Tensor) -> Tensor:
        found = layer_of(weight).of_each(lambda p: momentum_of(optimizer, p))
        return torch.zeros_like(weight) if found is None else found

    def gradient(weight: Tensor) -> Tensor:
        if gradients is None:
            raise RuntimeError(
                "the dense gradient was not collected: decorate the function that reads it with "
                '`@ps.moves.needs("gradient")`.'
            )
        name = name_of(weight)
        found = gradients[name]
        if found is None:
            return torch.zeros_like(weight)
        return layer_of(weight).seen([found.to_dense() if found.is_sparse else found])

    seen = Masking(
        optimizer=optimizer, weights=weights, prune_rate=prune_rate, model=model,
        masks={name: layer.seen_mask() for name, layer in layers.items()},
        baseline_nonzero=baseline_nonzero, momentum=momentum, gradient=gradient,
    )  # fmt: skip
    for name, layer in layers.items():
        if isinstance(layer, CompactLayer):
            seen.name2zeros[name] = layer.numel - seen.name2nonzeros[name]
    return seen
