"""Statistics of a model while it ran: gradients, curvature, inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parasparse import dtypes
from parasparse.scores.grams import Grams
from parasparse.scores.layouts import Layout
from parasparse.scores.products import each_part, product, wide
from parasparse.scores.synaptic_flow import flows_of
from parasparse.sharding.dtensors import full_tensor, on_local
from parasparse.sharding.fsdp import is_sharded
from parasparse.text import listed


@dataclass(eq=False)
class Sums:
    """Sums over the backward passes that reached one tensor.

    Attributes:
        read: returns the tensor as it is stored now.
        leaf: the tensor that gets its gradient; None if no tensor does.
        parameter: the Parameter that stores it; None if another parametrization computes it.
        passes: number of backward passes.
        gradient, squares, movement: sums of g, g^2 (by component if complex) and -w g.
    """

    read: Callable[[], Tensor]
    leaf: Tensor | None
    parameter: Tensor | None
    passes: int = 0
    gradient: Tensor | None = None
    squares: Tensor | None = None
    movement: Tensor | None = None

    @torch.no_grad()
    def add(self, grad: Tensor) -> None:
        """Add the gradient of a backward pass."""
        grad = wide(grad.detach().to_dense() if grad.is_sparse else grad.detach())
        self.passes += 1
        self.gradient = _plus(self.gradient, grad)
        self.squares = _plus(self.squares, each_part(lambda g: g.square(), grad))
        self.movement = _plus(self.movement, -product(wide(self.read().detach()), grad))


@dataclass(eq=False, repr=False)
class Statistics:
    """Statistics from `collect`, for scores that need more than the weight.

    Reading methods take the plain name of a tensor, and raise `RuntimeError` if nothing was
    collected for it or gradients are not finite. Methods that add work only inside the block.
    """

    model: Any
    sums: dict[str, Sums]
    parts: Mapping[str, list[str]]
    squared_inputs: dict[str, Tensor] = field(default_factory=dict)
    curvatures: dict[str, Tensor] = field(default_factory=dict)
    flows: dict[str, Tensor] = field(default_factory=dict)
    grams: Grams | None = None
    is_paused: bool = False

    def __repr__(self) -> str:
        return f"Statistics({len(self.sums)} tensors)"

    def gradient(self, name: str) -> Tensor:
        """Return the mean gradient over backward passes."""
        return self._mean(name, "gradient")

    def squared_gradient(self, name: str) -> Tensor:
        """Return the mean of g^2, of real and imaginary part separately if complex."""
        return self._mean(name, "squares")

    def movement(self, name: str) -> Tensor:
        """Return the sum of -w g, with w as it was in each backward pass."""
        found = [self._sums(part).movement for part in self._parts(name)]
        return _finite(torch.stack([part for part in found if part is not None]).sum(0), name)

    def hessian_gradient(self, name: str) -> Tensor:
        """Return the sum of H g over the losses given to `add_curvature`."""
        remedy = "Call `statistics.add_curvature(loss)` for each batch in the block."
        return _joined([_seen(self.curvatures, p, "curvature", remedy) for p in self._parts(name)])

    def synaptic_flow(self, name: str) -> Tensor:
        """Return the sum of |w| dR/d|w| over the calls of `add_synaptic_flow`."""
        remedy = "Call `statistics.add_synaptic_flow(torch.ones(...))` in the block."
        found = [_seen(self.flows, part, "synaptic flow", remedy) for part in self._parts(name)]
        return torch.stack(found).sum(0)

    def input_norm(self, name: str) -> Tensor:
        """Return the 2-norm of the inputs of each entry over batches; broadcasts to the tensor."""
        if self.grams is not None and self.grams.samples(name):
            diagonal = self._gram(name).diagonal(dim1=-2, dim2=-1)
            return self.layout(name).of_inputs(diagonal, self.sums[name].read().shape).sqrt()
        remedy = (
            "Run the model in the block, not compiled. Inputs are recorded for Linear, "
            "convolutions and embeddings that are called as modules. Use another score for others."
        )
        found = [_seen(self.squared_inputs, part, "input", remedy) for part in self._parts(name)]
        return torch.stack(found).sum(0).sqrt()

    def stored(self, name: str) -> Tensor:
        """Return the tensor as it is stored now."""
        return _joined([self.sums[part].read().detach() for part in self._parts(name)])

    def gram(self, name: str) -> Tensor:
        """Return x x^T summed over the inputs of the tensor: (in, in), float64, not a copy.

        Convolutions have one for each group, (groups, in, in), whose inputs are patches
        (in_channels / groups * kernel entries); of one group, (in, in). A stack of matrices, such
        as fused experts, has one for each, (experts, in, in).
        """
        total = self._gram(name)
        return total if len(total) > 1 or self.layout(name).is_stack else total[0]

    def count(self, name: str) -> int:
        """Return how many inputs `gram(name)` sums, such as tokens; 0 if there were none."""
        self._watched(name)
        return self._grams().samples(name)

    def layout(self, name: str) -> Layout:
        """Return how the tensor is made of matrices, one for each Gram matrix."""
        return self._watched(name)

    def add_curvature(self, loss: Tensor) -> None:
        """Add H g for each tensor, with gradient g and Hessian H of `loss`.

        Args:
            loss: a scalar with its graph, which is retained; must depend on the collected tensors.
                Fused attention has no second derivative, so use
                `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
        """
        self._opened()
        tensors = {n: sums.leaf for n, sums in self.sums.items() if sums.leaf is not None}
        leaves = list(tensors.values())
        with self._paused():
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            # d/dw of sum(g * constant g) is H g
            total = sum(dtypes.total(product(g, g.detach())) for g in grads if g is not None)
            if not isinstance(total, Tensor):
                raise RuntimeError("`loss` must depend on the tensors that are collected.")
            found: Any = [None] * len(leaves)
            if total.requires_grad:  # else H is 0
                found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        for (name, leaf), value in zip(tensors.items(), found, strict=True):
            value = torch.zeros_like(leaf) if value is None else value
            self.curvatures[name] = _plus(self.curvatures.get(name), wide(value.detach()))

    def add_synaptic_flow(self, *inputs: Any, **keywords: Any) -> None:
        """Add |w| dR/d|w|, where R sums the outputs of the model with |w| for all its w.

        The model runs in float64 and evaluation mode, and is not changed.

        Args:
            inputs: arguments of the model, all ones in the paper.
            keywords: keyword arguments of the model.

        Raises:
            RuntimeError: the flow is 0 everywhere, a weight has a parametrization other than a bool
                or real mask, the block has ended, or the model is sharded.
        """
        model = self._opened()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        others = [name for name, sums in self.sums.items() if id(sums.parameter) not in names]
        if others:
            raise RuntimeError(
                "synaptic flow needs weights that are plain or have a bool or real mask; not "
                f"{listed(others)}. Exclude them from `targets`."
            )
        leaves = {name: names[id(sums.parameter)] for name, sums in self.sums.items()}
        with self._paused():
            flows = flows_of(model, leaves, inputs, keywords)
        for name, values in flows.items():
            self.flows[name] = _plus(self.flows.get(name), values)

    def sum_over(self, group: Any, *, gradients: bool = True) -> None:
        """Sum over the processes of `group`, all of which must call this."""
        for name, sums in self.sums.items():
            if gradients:
                for what in ("gradient", "squares", "movement"):
                    setattr(sums, what, _summed(getattr(sums, what), sums.read().device, group))
                passes = torch.tensor(sums.passes, device=sums.read().device)
                torch.distributed.all_reduce(passes, group=group)
                sums.passes = int(passes)
            for found in (self.squared_inputs, self.curvatures, self.flows):
                value = _summed(found.get(name), sums.read().device, group)
                if value is not None:
                    found[name] = value
        if self.grams is not None:
            device = next(iter(self.sums.values())).read().device
            self.grams.settle()
            self.grams.sum_over(group, lambda value: _summed(value, device, group))

    def close(self) -> None:
        """Release the model at the end of the block."""
        self.is_paused, self.model = True, None
        for sums in self.sums.values():
            sums.leaf = None
        if self.grams is not None:
            self.grams.settle()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Ignore backward passes in the block."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def _opened(self) -> Any:
        """Return the model; raise RuntimeError after the block or if it is sharded."""
        if self.model is None:
            raise RuntimeError("statistics must be added inside the `with` block; it has ended.")
        if is_sharded(self.model):
            raise RuntimeError("curvature and synaptic flow must be added before `fully_shard`.")
        return self.model

    def _grams(self) -> Grams:
        if self.grams is None:
            raise RuntimeError("Gram matrices were not collected. Use `collect(..., grams=True)`.")
        return self.grams

    def _watched(self, name: str) -> Layout:
        """Return the layout of tensor `name`; raise RuntimeError if it has no Gram matrix."""
        self._parts(name)
        layout = self._grams().layout(name)
        if layout is None:
            raise RuntimeError(
                f'no Gram matrix of "{name}" was collected. Real weights of Linear, Conv1d to '
                "Conv3d and the Conv1D of transformers have one, and stacks of matrices (experts, "
                "..., ...) that inputs were multiplied with. Exclude other tensors, or use a score "
                "that needs none."
            )
        return layout

    def _gram(self, name: str) -> Tensor:
        if not self.count(name):
            raise RuntimeError(
                f'no input of "{name}" was collected. Run the model in the block, not compiled. '
                "The layer must be called as a module."
            )
        return self._grams().total(name)

    def _parts(self, name: str) -> list[str]:
        parts = self.parts.get(name, [name])
        unknown = [part for part in parts if part not in self.sums]
        if unknown:
            known = listed(self.sums)
            raise RuntimeError(f'no statistics were collected for "{name}", only for {known}.')
        return parts

    def _sums(self, part: str) -> Sums:
        sums = self.sums[part]
        if not sums.passes:
            raise RuntimeError(
                f'no gradient of "{part}" was collected: no backward pass in the block reached it. '
                "A tensor that is frozen, or parametrized by other than a mask, gets a gradient "
                "under a mask: `sparsify(model, {name: 0.0})`."
            )
        return sums

    def _mean(self, name: str, what: str) -> Tensor:
        sums = [self._sums(part) for part in self._parts(name)]
        return _finite(_joined([getattr(each, what) / each.passes for each in sums]), name)


def _joined(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else on_local(torch.complex, *found)


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise RuntimeError(
            f'the statistics of "{name}" must be finite; a loss was not. Collect again, without '
            "the steps that a GradScaler skips."
        )
    return full_tensor(values)


def _summed(value: Tensor | None, device: torch.device, group: Any) -> Tensor | None:
    """Return the sum over `group`; processes without a value take part too."""
    shapes: list[Any] = [None] * torch.distributed.get_world_size(group)
    own = None if value is None else (value.shape, value.dtype)
    torch.distributed.all_gather_object(shapes, own, group=group)
    seen = [shape for shape in shapes if shape is not None]
    if not seen:
        return None
    shape, dtype = seen[0]
    total = torch.zeros(shape, dtype=dtype) if value is None else value.clone()
    total = total.to(device)
    torch.distributed.all_reduce(total, group=group)
    return total


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total.add_(value)


def _seen(found: Mapping[str, Tensor], name: str, what: str, remedy: str) -> Tensor:
    if name not in found:
        raise RuntimeError(f'the {what} of "{name}" was not collected. {remedy}')
    return found[name]
