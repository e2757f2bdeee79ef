"""What cannot be shrunk: wrapped, compiled, sharded, quantized and normalised models, gates."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from parasparse.attach.accelerated import check_not_accelerated
from parasparse.attach.compacted import check_not_compact
from parasparse.attach.offloading import check_not_offloaded
from parasparse.attach.older_hooks import legacy_hook, pruned_names
from parasparse.attach.reading import masked_stacks, stacks_of
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.masks.mask import Mask
from parasparse.sharding.dtensors import is_dtensor
from parasparse.targets.tensors import Target, named_modules, tensors_of

_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_WRAPPED = {  # the name of a submodule, and who calls it so
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def check_plain_layers(model: object) -> None:
    """Check that `model` consists of layers with plain weights or masks; it may be wrapped.

    Raises:
        TypeError: it is no module.
        RuntimeError: it is compact, a compiled program or quantized, or has other parametrizations
            than masks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {model!r:.60}.")
    check_not_compact(model, "`shrink`")
    for _, name, module, _ in named_modules(model):
        _check_no_program(name, module)
        _check_parametrizations(name, module)


def check_shrinkable(model: nn.Module) -> list[Target]:
    """Return the tensors of `model`, unless it is no module, or cannot be shrunk as it is.

    Raises:
        TypeError: it is no module.
        RuntimeError: it must be prepared first; the message says how.
    """
    check_plain_layers(model)
    check_not_accelerated(model)
    for _, name, module, _ in named_modules(model):
        _check_unwrapped(name, module)
        _check_not_in_use(name, module)
    tensors = tensors_of(model, pairs=False)
    for target in tensors:
        _check_tensor(target)
        _check_masks(target)
    return tensors


def check_has_values(tensors: list[Target]) -> None:
    """Raise RuntimeError if one of `tensors` or its mask is on the meta device."""
    for target in tensors:
        masks = [mask.mask for mask in target.masks() if isinstance(mask, Mask)]
        if any(t is not None and t.is_meta for t in (*target.originals(), *masks)):
            raise RuntimeError(
                f'"{target.name}" or its mask is on the meta device and has no values, so '
                "nothing tells which channels are dropped. Load the weights first, or pass a "
                "`Shrinkage` instead of `example_inputs`."
            )


def _refusal(name: str, module: nn.Module, what: str, fix: str) -> RuntimeError:
    where = f'"{name}" ({type(module).__name__})' if name else f"`model` ({type(module).__name__})"
    return RuntimeError(f"{where} {what}, so it cannot be shrunk. {fix}.")


def _check_unwrapped(name: str, module: nn.Module) -> None:
    if isinstance(module, _WRAPPERS):
        fix = "Pass its `.module`, and wrap the smaller model afterwards"
        raise _refusal(name, module, "wraps a model", fix)
    for inner, wrapper in _WRAPPED.items():
        if inner in module._modules:
            fix = f"Pass its `.{inner}`, or shrink before you wrap"
            raise _refusal(name, module, f"is a wrapper of {wrapper}", fix)


def _check_no_program(name: str, module: nn.Module) -> None:
    made = "Shrink the model that it was made from"
    if isinstance(module, torch.jit.ScriptModule):
        raise _refusal(name, module, "is compiled by torch.jit", made)
    if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
        raise _refusal(name, module, "is an exported program", made)
    if re.match(r"torch\.ao\.nn\..*quantized", type(module).__module__):
        raise _refusal(name, module, "is quantized", "Shrink the model before you quantize it")


def _check_parametrizations(name: str, module: nn.Module) -> None:
    for attr, stack in stacks_of(module).items():
        below, fix = list(stack), "Fold it first, with `squash`"
        if isinstance(stack, MaskedParametrizationList):
            below = stack.below()
        else:
            fix = f'Fold it first: nn.utils.parametrize.remove_parametrizations(module, "{attr}")'
        if below:
            raise _refusal(name, module, f'computes "{attr}" by {type(below[0]).__name__}', fix)
    if pruned_names(module):
        fix = "Call nn.utils.prune.remove, or `sparsify`, which takes its mask over"
        raise _refusal(name, module, "is masked by torch.nn.utils.prune", fix)
    for attr in list(module._parameters):
        kind = legacy_hook(module, attr)
        if kind is not None:
            fix = f"Fold it first, with nn.utils.remove_{kind}(module)"
            raise _refusal(name, module, f"has a hook of {kind}", fix)


def _check_not_in_use(name: str, module: nn.Module) -> None:
    for attr, stack in masked_stacks(module):
        if stack.frozen is not None or stack.probe is not None:
            block = "frozen" if stack.frozen is not None else "dense_gradients"
            fix = "Leave the `with` block first, or call `close` of the controller that uses it"
            raise _refusal(name, module, f'has its "{attr}" in use by `{block}`', fix)


def _check_tensor(target: Target) -> None:
    for site in target.sites:
        check_not_offloaded(site.module, site.attr, target.name)
    for tensor in target.originals():
        if type(tensor) in (nn.Parameter, Tensor):
            continue
        if is_dtensor(tensor):
            raise RuntimeError(
                f'"{target.name}" is sharded, so it cannot be shrunk. Shrink the model before '
                "`fully_shard` or `parallelize_module`."
            )
        if is_traceable_wrapper_subclass(tensor):
            raise RuntimeError(
                f'"{target.name}" is a {type(tensor).__name__}, so it cannot be shrunk. Shrink the '
                "model before you quantize it."
            )


def _check_masks(target: Target) -> None:
    for mask in target.masks():
        if isinstance(mask, Mask) and mask.is_bool:
            continue
        if isinstance(mask, Mask) and mask.mask is None:
            raise RuntimeError(
                f'the mask of "{target.name}" is not set, so nothing tells which channels it '
                "drops. Set it first, with `deploy_masks` or `Mask.mask_`."
            )
        raise RuntimeError(
            f'the mask of "{target.name}" is not bool ({type(mask).__name__}), so no channel is '
            "dropped for good. Call `binarize` first, or `squash`."
        )
