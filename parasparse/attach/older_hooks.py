"""Hooks that torch used before parametrize: pruning, weight_norm, spectral_norm."""

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def pruned_names(module: nn.Module) -> dict[str, int]:
    """Return the keys of torch's pruning hooks on `module`, by name of the pruned tensor."""
    return {
        hook._tensor_name: key
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, BasePruningMethod)
    }


def prune_mask(module: nn.Module, name: str) -> Tensor:
    """Return the mask of torch.nn.utils.prune for tensor `name`."""
    mask = module._buffers[f"{name}_mask"]
    assert mask is not None
    return mask


def undo_prune(module: nn.Module, name: str) -> None:
    """Remove torch's pruning from tensor `name`, and restore its stored values.

    Differs: `torch.nn.utils.prune.remove` overwrites them with the masked values.
    """
    del module._forward_pre_hooks[pruned_names(module)[name]]
    del module._buffers[f"{name}_mask"]
    module.__dict__.pop(name, None)
    module._parameters[name] = module._parameters.pop(f"{name}_orig")


def legacy_hook(module: nn.Module, name: str) -> str | None:
    """Return the name of the normalisation hook that owns tensor `name`, or None."""
    for hook in module._forward_pre_hooks.values():
        own = getattr(hook, "name", None)
        if isinstance(hook, WeightNorm) and name in (own, f"{own}_g", f"{own}_v"):
            return "weight_norm"
        if isinstance(hook, SpectralNorm) and name in (own, f"{own}_orig"):
            return "spectral_norm"
    return None
