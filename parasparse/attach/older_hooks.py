"""What else may hang on a tensor: masks of torch.nn.utils.prune, hooks older than parametrize."""

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def pruned_names(module: nn.Module) -> dict[str, int]:
    """Return the tensors of `module` that torch.nn.utils.prune masks, with their hooks' keys."""
    return {
        hook._tensor_name: key
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, BasePruningMethod)
    }


def prune_mask(module: nn.Module, name: str) -> Tensor:
    """Return the mask that torch.nn.utils.prune holds for tensor `name`."""
    mask = module._buffers[f"{name}_mask"]
    assert mask is not None
    return mask


def undo_prune(module: nn.Module, name: str) -> None:
    """Take torch's pruning off tensor `name`: its stored values come back, unmasked.

    Differs: `torch.nn.utils.prune.remove` overwrites them with the masked ones.
    """
    del module._forward_pre_hooks[pruned_names(module)[name]]
    del module._buffers[f"{name}_mask"]
    module.__dict__.pop(name, None)
    module._parameters[name] = module._parameters.pop(f"{name}_orig")


def legacy_hook(module: nn.Module, name: str) -> str | None:
    """Return which hook-based normalisation of old torch owns tensor `name`, or None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and name in (
            hook.name,
            f"{hook.name}_g",
            f"{hook.name}_v",
        ):
            return "weight_norm"
        if isinstance(hook, SpectralNorm) and name in (hook.name, f"{hook.name}_orig"):
            return "spectral_norm"
    return None
