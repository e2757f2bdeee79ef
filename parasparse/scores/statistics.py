"""What was seen of a model while it ran: gradients, curvature, inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parasparse.scores.products import each_part, product, wide
from parasparse.scores.synaptic_flow import flows_of
from parasparse.sharding.dtensors import full_tensor, on_local
from parasparse.sharding.fsdp import is_sharded
from parasparse.text import listed


@dataclass(eq=False)
class Sums:
    """Sums over the backward passes that reached one tensor.

    Attributes:
        read: gives the tensor as it is stored now.
        leaf: what its gradient is taken of; None if there is none.
        parameter: the Parameter that stores it; None if others are parametrized into it.
        passes: how many.
        gradient: sum of g.
        squares: sum of g^2; of the real and of the imaginary part where it is complex.
        movement: sum of -w g.
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
        """Count a backward pass that gave `grad`."""
        grad = wide(grad.detach().to_dense() if grad.is_sparse else grad.detach())
        self.passes += 1
        self.gradient = _plus(self.gradient, grad)
        self.squares = _plus(self.squares, each_part(lambda g: g.square(), grad))
        self.movement = _plus(self.movement, -product(wide(self.read().detach()), grad))


@dataclass(eq=False, repr=False)
class Statistics:
    """What `collect` saw, for scores that need more than the weight.

    Methods that read take the plain name of a tensor, and raise RuntimeError if nothing was seen of
    it, or what is not finite; those that add work inside the block only.
    """

    model: Any
    sums: dict[str, Sums]
    parts: Mapping[str, list[str]]
    squared_inputs: dict[str, Tensor] = field(default_factory=dict)
    curvatures: dict[str, Tensor] = field(default_factory=dict)
    flows: dict[str, Tensor] = field(default_factory=dict)
    is_paused: bool = False

    def __repr__(self) -> str:
        return f"Statistics({len(self.sums)} tensors)"

    def gradient(self, name: str) -> Tensor:
        """Return the mean of the gradients of the backward passes."""
        return _finite(self._joined(name, lambda part: _mean(self._sums(part), "gradient")), name)

    def squared_gradient(self, name: str) -> Tensor:
        """Return the mean of their squares; complex: of the real and of the imaginary part."""
        return _finite(self._joined(name, lambda part: _mean(self._sums(part), "squares")), name)

    def movement(self, name: str) -> Tensor:
        """Return the sum of -w g, w as it was at each backward pass."""
        found = [self._sums(part).movement for part in self._parts(name)]
        return _finite(torch.stack([part for part in found if part is not None]).sum(0), name)

    def hessian_gradient(self, name: str) -> Tensor:
        """Return the sum of H g over the losses that `add_curvature` got."""
        remedy = "Call `statistics.add_curvature(loss)` for each batch in the block."
        return self._joined(name, lambda part: _seen(self.curvatures, part, "curvature", remedy))

    def synaptic_flow(self, name: str) -> Tensor:
        """Return |w| times the gradient of the flow that `add_synaptic_flow` measured."""
        remedy = "Call `statistics.add_synaptic_flow(torch.ones(...))` in the block."
        parts = self._parts(name)
        found = [_seen(self.flows, part, "synaptic flow", remedy) for part in parts]
        return torch.stack(found).sum(0)

    def input_norm(self, name: str) -> Tensor:
        """Return the 2-norm of what each entry was multiplied by, over all batches and places.

        Its shape broadcasts to that of the tensor.
        """
        (part, *more) = self._parts(name)
        remedy = (
            "Run the model in the block, not compiled. Known are inputs of Linear, convolutions "
            "and embeddings that are called as modules; for other tensors take another score."
        )
        squares = _seen(self.squared_inputs, part, "input", remedy)
        for other in more:
            squares = squares + _seen(self.squared_inputs, other, "input", remedy)
        return squares.sqrt()

    def add_curvature(self, loss: Tensor) -> None:
        """Add H g of `loss` for each tensor: g its gradient, H its Hessian.

        Args:
            loss: a scalar with its graph, which stays. Not one of attention kernels that know no
                second derivative (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` does).
        """
        self._open_whole()
        tensors = {n: sums.leaf for n, sums in self.sums.items() if sums.leaf is not None}
        leaves = list(tensors.values())
        with self._paused():
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            # d/dw of sum(g * constant g), which is H g
            total = sum(product(g, g.detach()).sum() for g in grads if g is not None)
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

        In float64 and evaluation mode; the model stays as it is.

        Args:
            inputs: of the model; all ones in the paper, so that no data are needed.
            keywords: the same.

        Raises:
            RuntimeError: there is no flow, since a layer normalises it away; or a weight is masked
                or parametrized by other than a bool or real mask.
        """
        model = self._open_whole()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        others = [name for name, sums in self.sums.items() if id(sums.parameter) not in names]
        if others:
            raise RuntimeError(
                "synaptic flow must go through weights that are plain, or under a mask; "
                f"{listed(others)} are computed otherwise. Leave them out of `targets`."
            )
        leaves = {name: names[id(sums.parameter)] for name, sums in self.sums.items()}
        with self._paused():
            flows = flows_of(self.model, leaves, inputs, keywords)
        for name, values in flows.items():
            self.flows[name] = _plus(self.flows.get(name), values)

    def sum_over(self, group: Any, *, gradients: bool = True) -> None:
        """Add up what the processes of `group` saw, which all come here."""
        for name, sums in self.sums.items():
            if gradients:
                for what in ("gradient", "squares", "movement"):
                    value = _summed(getattr(sums, what), sums.read(), group)
                    setattr(sums, what, value)
                passes = torch.tensor(sums.passes, device=sums.read().device)
                torch.distributed.all_reduce(passes, group=group)
                sums.passes = int(passes)
            for found in (self.squared_inputs, self.curvatures, self.flows):
                value = _summed(found.get(name), sums.read(), group)
                if value is not None:
                    found[name] = value

    def close(self) -> None:
        """Let go of the model: the block ends."""
        self.is_paused, self.model = True, None
        for sums in self.sums.values():
            sums.leaf = None

    def _open(self) -> Any:
        if self.model is None:
            raise RuntimeError("statistics must be added inside the `with` block; it has ended.")
        return self.model

    def _paused(self) -> Any:
        return _Paused(self)

    def _open_whole(self) -> Any:
        model = self._open()
        if is_sharded(model):
            raise RuntimeError(
                "curvature and synaptic flow must be added before `fully_shard`, on a model whose "
                "weights each process holds."
            )
        return model

    def _parts(self, name: str) -> list[str]:
        parts = self.parts.get(name, [name])
        unknown = [part for part in parts if part not in self.sums]
        if unknown:
            raise RuntimeError(
                f'statistics must be collected of "{name}"; they are of {listed(self.sums)}.'
            )
        return parts

    def _sums(self, part: str) -> Sums:
        sums = self.sums[part]
        if not sums.passes:
            raise RuntimeError(
                f'a gradient of "{part}" must have been collected; no backward pass in the block '
                "reached it. (One that is frozen, or parametrized by other than a mask, gets one "
                "once it is masked: `sparsify(model, {name: 0.0})`.)"
            )
        return sums

    def _joined(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        found = [read(part) for part in self._parts(name)]
        return found[0] if len(found) == 1 else on_local(torch.complex, *found)


class _Paused:
    """Backward passes of our own are not the user's."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def __enter__(self) -> None:
        self.statistics.is_paused = True

    def __exit__(self, *_: object) -> None:
        self.statistics.is_paused = False


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise RuntimeError(
            f'what was collected of "{name}" must be finite; a loss was not. Collect anew, without '
            "the steps that a GradScaler skips."
        )
    return full_tensor(values)


def _summed(value: Tensor | None, like: Tensor, group: Any) -> Tensor | None:
    """Return the sum over `group`; a process that saw nothing takes part."""
    shapes: list[Any] = [None] * torch.distributed.get_world_size(group)
    own = None if value is None else (value.shape, value.dtype)
    torch.distributed.all_gather_object(shapes, own, group=group)
    seen = [shape for shape in shapes if shape is not None]
    if not seen:
        return None
    shape, dtype = seen[0]
    total = torch.zeros(shape, dtype=dtype, device=like.device) if value is None else value.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total.add_(value)


def _mean(sums: Sums, what: str) -> Tensor:
    total: Tensor = getattr(sums, what)
    return total / sums.passes


def _seen(found: Mapping[str, Tensor], name: str, what: str, remedy: str) -> Tensor:
    if name not in found:
        raise RuntimeError(f'the {what} of "{name}" must have been collected; it was not. {remedy}')
    return found[name]
