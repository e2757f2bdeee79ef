"""What a module holds: stored and effective tensors, their masks, their names."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasparse.attach.older_hooks import prune_mask, pruned_names
from parasparse.attach.stack import MaskedParametrizationList, original_names, stack_of


def masked_stacks(module: nn.Module) -> Iterator[tuple[str, MaskedParametrizationList]]:
    """Yield the name and the stack of each tensor of `module` itself that carries a mask."""
    for name, stack in stacks_of(module).items():
        if isinstance(stack, MaskedParametrizationList):
            yield name, stack


def all_masked_stacks(model: nn.Module) -> list[MaskedParametrizationList]:
    """Return the stacks of all masked tensors of `model`, at each of their places."""
    return [stack for module in model.modules() for _, stack in masked_stacks(module)]


def mask_module(module: nn.Module, name: str) -> nn.Module | None:
    """Return what masks tensor `name` of `module`, or None."""
    stack = stack_of(module, name)
    return stack.mask if isinstance(stack, MaskedParametrizationList) else None


def stored(module: nn.Module, name: str) -> Tensor:
    """Return tensor `name` of `module` without its mask, whatever lies underneath."""
    stack = stack_of(module, name)
    if isinstance(stack, MaskedParametrizationList):
        with _at_rest(stack):
            return stack.stored()
    if name in pruned_names(module):
        return getattr(module, f"{name}_orig")  # type: ignore[no-any-return]
    with _at_rest(stack):
        return getattr(module, name)  # type: ignore[no-any-return]


def effective(module: nn.Module, name: str) -> Tensor:
    """Return tensor `name` of `module` as the module sees it."""
    if name in pruned_names(module):  # the attribute is stale until the next forward
        return stored(module, name) * prune_mask(module, name)
    with _at_rest(stack_of(module, name)):
        return getattr(module, name)  # type: ignore[no-any-return]


@contextmanager
def _at_rest(stack: nn.Module | None) -> Iterator[None]:
    """Read without changing anything: spectral_norm in training mode iterates at each reading."""
    training = [] if stack is None else [module for module in stack.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def originals(module: nn.Module, name: str) -> tuple[Tensor, ...]:
    """Return the tensors that hold the values of `name`: their identities tell ties."""
    stack = stack_of(module, name)
    if stack is None:
        return (stored(module, name),)
    return tuple(getattr(stack, key) for key in original_names(stack))


def tensor_names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the parameters and of the buffers of `module`, as when it was dense."""
    parameters = [name for name, tensor in module._parameters.items() if tensor is not None]
    buffers = [name for name, tensor in module._buffers.items() if tensor is not None]
    for name in pruned_names(module):
        parameters[parameters.index(f"{name}_orig")] = name
        buffers.remove(f"{name}_mask")
    for name, stack in stacks_of(module).items():
        held = getattr(stack, original_names(stack)[0])
        (parameters if isinstance(held, nn.Parameter) else buffers).append(name)
    first_parameters, first_buffers = module.__dict__.get("_dense_order", ((), ()))
    return in_order(parameters, first_parameters), in_order(buffers, first_buffers)


def stacks_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the stack of each parametrized tensor of `module` itself, ours or torch's own."""
    if "parametrizations" not in module._modules:
        return {}
    return module._modules["parametrizations"]._modules  # type: ignore[union-attr, return-value]


def in_order(names: list[str], first: tuple[str, ...] | list[str]) -> list[str]:
    """Return `names` with those of `first` in front, in its order."""
    return [n for n in first if n in names] + [n for n in names if n not in first]
