"""One masked tensor as the moves of dynamic sparse training see it: by entry, or by unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parasparse.attach.pair_stack import joined
from parasparse.masks.apply import apply_mask_
from parasparse.masks.mask import Mask
from parasparse.optim import momentum_of, parameters_of, zero_entries
from parasparse.patterns import Pattern, n_of_m, unstructured
from parasparse.patterns.units import has_units
from parasparse.sharding.dtensors import fill_, full_tensor, laid_out_like
from parasparse.targets.tensors import Target
from parasparse.training.dynamic.view import Masking


@dataclass(frozen=True, eq=False)
class Layer:
    """A masked tensor, what the optimizer holds for it, and the pattern of its mask.

    Attributes:
        target: where it hangs.
        pattern: units are what is counted and moved; groups of `n_of_m` keep their n.
    """

    target: Target
    pattern: Pattern = unstructured

    @property
    def parameters(self) -> list[Tensor]:
        """The Parameter; the real and the imaginary one of a pair."""
        return parameters_of(self.target)

    @property
    def module(self) -> Mask:
        """What masks it."""
        modules = self.target.masks()
        if len(modules) != 1 or not isinstance(modules[0], Mask):
            raise RuntimeError(
                f'the controller\'s mask of "{self.target.name}" must stay where it is; it was '
                "taken off or replaced. Make a new controller."
            )
        return modules[0]

    def check_masked(self) -> None:
        """Raise RuntimeError if the mask was taken off or replaced."""
        _ = self.module

    @property
    def groups(self) -> n_of_m | None:
        """The pattern, if it is one of groups."""
        return self.pattern if isinstance(self.pattern, n_of_m) else None

    @property
    def mask(self) -> Tensor:
        """The mask of all entries, laid out over processes as the weight is; the live one."""
        mask = self.module.mask
        assert mask is not None
        return laid_out_like(mask, self.parameters[0])

    def seen_mask(self) -> Tensor:
        """Return a copy of the mask, of units where these count."""
        if has_units(self.pattern):
            return self.pattern.pool(full_tensor(self.mask).float()) > 0
        return self.mask.clone()

    def seen_weight(self) -> Tensor:
        """Return the weight as moves get it."""
        parameters = self.parameters
        plain = len(parameters) == 1 and not has_units(self.pattern)
        return parameters[0] if plain else self.seen([p.detach() for p in parameters])

    def seen(self, parts: Sequence[Tensor]) -> Tensor:
        """Return values of the Parameters as moves get them: joined, and pooled by unit."""
        values = parts[0] if len(parts) == 1 else joined(*parts)
        return self.pattern.pool(full_tensor(values).abs()) if has_units(self.pattern) else values

    def of_each(self, read: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """Return what `read` gives of the Parameters as moves get it; None if nothing is there."""
        parameters = self.parameters
        found = [read(parameter) for parameter in parameters]
        if all(part is None for part in found):
            return None
        both = zip(parameters, found, strict=True)
        return self.seen([torch.zeros_like(p) if part is None else part for p, part in both])

    def entries(self, seen: Tensor) -> Tensor:
        """Return the mask of all entries that has `seen`, as moves give it."""
        if not has_units(self.pattern):
            return seen
        return laid_out_like(self.pattern.spread(seen, self.mask.shape), self.mask)

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Set weights to 0 where they are masked."""
        mask = self.mask
        for parameter in self.parameters:
            apply_mask_(parameter, mask)

    @torch.no_grad()
    def set_mask(
        self, mask: Tensor, optimizer: torch.optim.Optimizer, *, keep_state_of_grown: bool
    ) -> None:
        """Put `mask` in place: what is dropped or grown is 0, and so is its optimizer state."""
        before = self.mask.clone()
        self.module.mask_(mask)
        changed = before ^ mask
        for parameter in self.parameters:
            fill_(parameter, changed, 0.0)
            zero_entries(optimizer, parameter, changed & before if keep_state_of_grown else changed)


def view_of(
    layers: Mapping[str, Layer],
    optimizer: torch.optim.Optimizer,
    gradients: Mapping[str, Tensor | None] | None,
    prune_rate: float,
    baseline_nonzero: int,
    model: nn.Module,
) -> Masking:
    """Return what moves see of `layers`; `gradients` are dense, None if nobody asked for them."""
    weights = {name: layer.seen_weight() for name, layer in layers.items()}
    names = {id(weight): name for name, weight in weights.items()}

    def name_of(weight: Tensor) -> str:
        if id(weight) not in names:
            raise ValueError("`weight` must be one that a move was given; got another tensor.")
        return names[id(weight)]

    def momentum(weight: Tensor) -> Tensor:
        found = layers[name_of(weight)].of_each(lambda p: momentum_of(optimizer, p))
        return torch.zeros_like(weight) if found is None else found

    def gradient(weight: Tensor) -> Tensor:
        if gradients is None:
            raise RuntimeError(
                "the dense gradient must be asked for: decorate the function that reads it with "
                '`@ps.moves.needs("gradient")`.'
            )
        name = name_of(weight)
        found = gradients[name]
        if found is None:
            return torch.zeros_like(weight)
        return layers[name].seen([found.to_dense() if found.is_sparse else found])

    return Masking(
        optimizer=optimizer,
        weights=weights,
        masks={name: layer.seen_mask() for name, layer in layers.items()},
        prune_rate=prune_rate,
        baseline_nonzero=baseline_nonzero,
        model=model,
        momentum=momentum,
        gradient=gradient,
    )
