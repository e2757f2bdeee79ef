"""The values that the modules of a model give to their tensors with `reset_parameters`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from parasparse.attach.offloading import check_not_offloaded
from parasparse.names import join
from parasparse.text import listed

Device: TypeAlias = torch.device | str | int


def initial_values(
    model: nn.Module, without: set[int], device: Device, generator: torch.Generator
) -> dict[int, Tensor]:
    """Return tensors on `device` for those of `model` that are on the meta device, by id.

    Tensors with an id in `without` are left out. `model` is unchanged. While its modules initialize
    themselves, tensors that are left out or have values already are on the meta device, where
    writing to them does nothing.

    Raises:
        RuntimeError: a tensor gets no value.
    """
    slots = list(_slots(model))
    wanted = {}
    for module, held, name, full_name in slots:
        if held[name].is_meta and id(held[name]) not in without:
            check_not_offloaded(module, name, full_name)
            wanted[id(held[name])] = full_name
    before = [(held, name, held[name]) for _, held, name, _ in slots]
    stand_ins = {id(t): _stand_in(t, wanted.get(id(t))) for _, _, t in before}
    try:
        for held, name, tensor in before:
            held[name] = stand_ins[id(tensor)]
        with torch.no_grad(), _drawing_from(generator):
            _reset(model, {id(stand_ins[key]) for key in wanted})
        values = {id(t): held[name] for held, name, t in before if id(t) in wanted}
    finally:
        for held, name, tensor in before:
            held[name] = tensor
    empty = [wanted[key] for key, value in values.items() if _is_unset(value)]
    if empty:
        raise RuntimeError(
            f"{listed(empty)} would be left on the meta device, because no `reset_parameters` "
            "gives them values. Assign tensors with values to these attributes before the call, "
            "or give their module a method `reset_parameters`."
        )
    return {id(t): _like(t, values[id(t)].to(device)) for _, _, t in before if id(t) in wanted}


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, str]]:
    """Yield module, dict, name and full name of all tensors, tied ones under each name."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield module, held, name, join(path, name)


def _stand_in(tensor: Tensor, wanted: str | None) -> Tensor:
    """Return a tensor to be initialized, or one on the meta device if its name is None."""
    device = "meta" if wanted is None else "cpu"
    try:
        # Not `empty_like`, for which torch imports much on the meta device.
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    except RuntimeError as error:
        error.add_note(f'for "{wanted}" {tuple(tensor.shape)}, which no rule makes sparse')
        raise
    if wanted is not None:
        new.fill_(_unset(tensor.dtype))
    return _like(tensor, new)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` as a Parameter if `tensor` is one."""
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(value.detach(), tensor.requires_grad) if is_parameter else value


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    is_integer = not (dtype.is_floating_point or dtype.is_complex)
    return torch.iinfo(dtype).max if is_integer else torch.nan


def _is_unset(value: Tensor) -> bool:
    if not value.numel():
        return False
    unset = _unset(value.dtype)
    return bool((value != value).any() if unset != unset else (value == unset).all())


def _reset(model: nn.Module, wanted: set[int]) -> None:
    """Let each module that has some of the `wanted` tensors below it reset them, children first."""
    for path, module in reversed(list(model.named_modules())):
        reset: Callable[[], Any] | None = None
        for name in ("reset_parameters", "_reset_parameters"):  # the latter in MultiheadAttention
            reset = reset or getattr(module, name, None)
        below = [*module.parameters(), *module.buffers()]
        if reset is None or wanted.isdisjoint(map(id, below)):
            continue
        try:
            reset()
        except Exception as error:
            error.add_note(f'while `reset_parameters` of "{path}" ({type(module).__name__}) ran')
            raise


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Let torch's global generator continue from `generator`, and restore it afterwards."""
    if generator is torch.default_generator:
        yield
        return
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(seed))
    try:
        yield
    finally:
        torch.set_rng_state(before)
