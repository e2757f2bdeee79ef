"""Runs the masked and the smaller network, and says where they differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parasparse.shrink.epsilons import state_epsilons
from parasparse.shrink.first_call import first_other_call
from parasparse.shrink.random_numbers import same_random_numbers
from parasparse.shrink.running import ALONE, call, copied_inputs, tensors_in
from parasparse.verbs.squash import squash

_DOUBLE = {True: torch.complex128, False: torch.float64}


class Reference:
    """The outputs of a masked network, to which those of the smaller one are compared.

    Both are copies in eval mode, in float64 or complex128, or in their own dtype if the network
    does not run in float64.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._inputs = example_inputs
        # Constants are added to biases in the dtype of the model.
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
        self._eps = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
        self._rounding = 16 * self._eps
        try:
            self._run(model, _as_double)
        except Exception:  # whatever a program raises that runs in one dtype only
            self._run(model, _as_it_is)

    def _run(self, model: nn.Module, cast: Callable[[Tensor], Tensor]) -> None:
        self._cast = cast
        self._model = _copied(model, cast)
        self._outputs = _outputs(self._model, self._cast_inputs())

    def check(
        self, small: nn.Module, *, equal: bool = True, rescaled: int = 0,
        epsilons: Collection[float] = (),
    ) -> None:  # fmt: skip
        """Raise RuntimeError if `small` fails or, if `equal`, computes something else.

        Args:
            small: the smaller network.
            equal: whether it must compute the same.
            rescaled: how many of its weights were rounded once more. These are weights of norms,
                which often compute in float32.
            epsilons: those that such norms have now.
        """
        if rescaled:
            float32 = torch.finfo(torch.float32).eps
            self._rounding = 16 * max(self._eps, float32) * (1 + rescaled)
        small = _copied(small, self._cast)
        try:
            outputs = _outputs(small, self._cast_inputs())
        except Exception as error:
            self._squash_both(small)
            raise RuntimeError(
                f"the smaller network fails{self._first(small)}: {error!r}."
                f"{self._call(small, epsilons)} {_UNCHANGED}"
            ) from error
        if not equal:
            return
        if self._compute_the_same(outputs):
            return
        self._squash_both(small)
        pairs = list(zip(self._outputs, outputs, strict=False))
        errors = [_error(*pair) for pair in pairs if pair[0].shape == pair[1].shape]
        by = f" by {max(errors):.2g} times the largest output" if errors else ""
        if any(out.isnan().any() for out in self._outputs):
            raise RuntimeError(f"the masked network computes NaN{self._first(small)}. {_NAN}")
        raise RuntimeError(
            f"the smaller network does not compute what the masked one does: it differs{by}"
            f"{self._first(small)}.{self._call(small, epsilons)} {_UNCHANGED}"
        )

    def _compute_the_same(self, outputs: list[Tensor]) -> bool:
        return len(self._outputs) == len(outputs) and all(
            map(self._are_close, self._outputs, outputs)
        )

    def _squash_both(self, small: nn.Module) -> None:
        """Squash both copies, to compare their modules; raise RuntimeError if that tells them."""
        squash(small)
        squash(self._model)
        if not self._compute_the_same(_outputs(self._model, self._cast_inputs())):
            raise RuntimeError(_MASKS_NOT_USED)

    def _cast_inputs(self) -> Any:
        return copied_inputs(self._inputs, self._cast)

    def _first(self, small: nn.Module) -> str:
        """Return which module is the first to differ, for messages."""
        masked, _ = _recorded(self._model, self._cast_inputs())
        found, failed = _recorded(small, self._cast_inputs())
        for (name, outputs), (_, others) in zip(masked, found, strict=False):
            if not all(self._is_part(*pair) for pair in zip(outputs, others, strict=False)):
                return _named(small, name)
        return "" if failed is None else _named(small, failed)

    def _call(self, small: nn.Module, epsilons: Collection[float]) -> str:
        """Return what the smaller network is given otherwise, for messages."""
        masked = partial(_outputs, self._model, self._cast_inputs())
        return first_other_call(masked, partial(_outputs, small, self._cast_inputs()), epsilons)

    def _are_close(self, want: Tensor, got: Tensor, scale: Tensor | None = None) -> bool:
        if want.shape != got.shape:
            return False
        # Far above what rounding adds up to in deep networks, far below what a channel is worth.
        exact = not (want.is_floating_point() or want.is_complex())
        most = 0.0 if exact else max(torch.finfo(want.dtype).eps ** 0.4, self._rounding)
        return _error(want, got, scale) <= most

    def _is_part(self, want: Tensor, got: Tensor) -> bool:
        """Whether `got` is `want`, or what is left of it without some slices of a dimension."""
        if want.shape == got.shape or want.ndim != got.ndim:
            return self._are_close(want, got)
        dims = [d for d in range(want.ndim) if want.shape[d] != got.shape[d]]
        if len(dims) > 1:
            return True  # which entries are left cannot be told
        scale, slices = _scale(want), iter(want.unbind(dims[0]))
        return all(
            any(self._are_close(one, part, scale) for one in slices) for part in got.unbind(dims[0])
        )


_MASKS_NOT_USED = (
    "the network computes something else once its masks are squashed, so it does not use every "
    "mask. The model is unchanged. Its code reads a masked Parameter from a place that no mask "
    "reaches, such as a plain list of modules or Parameters: use `nn.ModuleList` or "
    "`nn.ParameterList`, and the entries of that list."
)
_NAN = (
    "The model is unchanged. Channels that are all masked sum to 0, and a division by their sum is "
    "NaN: add a small number to what is divided by, or leave the channels of this module out with "
    "`targets`."
)
_UNCHANGED = (
    "The model is unchanged. Its code depends on a size or value in a way that one run does not "
    "show, such as `1.0 / size`, with a float on the left: write `size**-1`, or leave the channels "
    "of this module out with `targets`."
)


def _named(model: nn.Module, name: str) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f', first in "{name}" ({kind})' if name else f", in {kind}"


def _as_double(tensor: Tensor) -> Tensor:
    floating = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to(_DOUBLE[tensor.is_complex()]) if floating else tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _copied(model: nn.Module, cast: Callable[[Tensor], Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)  # with masks, which its code may not use
    copied.eval()
    state_epsilons(copied)
    copied._apply(cast)
    return copied


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with ALONE, torch.no_grad(), same_random_numbers():
        return tensors_in(call(model, inputs))


def _recorded(model: nn.Module, inputs: Any) -> tuple[list[tuple[str, list[Tensor]]], str | None]:
    """Return the outputs of each module that ends, until one fails, and the name of that one."""
    found: list[tuple[str, list[Tensor]]] = []
    running: list[str] = []

    def entering(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leaving(_: Any, __: Any, out: Any) -> None:
        found.append((running.pop(), [t.clone() for t in tensors_in(out)]))

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(entering(name)))
        hooks.append(module.register_forward_hook(leaving))
    try:
        _outputs(model, inputs)
    except Exception:  # its caller has seen it
        return found, running[-1] if running else None
    finally:
        for hook in hooks:
            hook.remove()
    return found, None


def _error(want: Tensor, got: Tensor, scale: Tensor | None = None) -> float:
    """Return the largest difference, relative to the largest value."""
    if not want.numel():
        return 0.0
    scale = _scale(want) if scale is None else scale
    want, got = _as_number(want), _as_number(got)
    same = (want == got) | (want.isnan() & got.isnan())
    difference = torch.where(same, 0.0, (want - got).abs())
    return float(difference.nan_to_num(torch.inf).max() / scale)


def _scale(tensor: Tensor) -> Tensor:
    sizes = _as_number(tensor).abs()
    return sizes.nan_to_num(0.0, 0.0).max().clamp(min=1e-30)


def _as_number(tensor: Tensor) -> Tensor:
    return tensor.to(_DOUBLE[tensor.is_complex()])
