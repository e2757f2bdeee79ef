"""The size attributes of torch's own layers, which follow from the shapes of their parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from parasparse.shrink.attributes import holder_of
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.sizes import plain

# Class, attribute, parameter or buffer, dimension. The first tensor that a layer has counts.
_SIZES: tuple[tuple[type[nn.Module], str, str, int], ...] = (
    (nn.Linear, "in_features", "weight", 1),
    (nn.Linear, "out_features", "weight", 0),
    (nn.Bilinear, "in1_features", "weight", 1),
    (nn.Bilinear, "in2_features", "weight", 2),
    (nn.Bilinear, "out_features", "weight", 0),
    (nn.Embedding, "embedding_dim", "weight", 1),
    (nn.EmbeddingBag, "embedding_dim", "weight", 1),
    (_NormBase, "num_features", "weight", 0),
    (_NormBase, "num_features", "running_mean", 0),
    (nn.GroupNorm, "num_channels", "weight", 0),
    (nn.PReLU, "num_parameters", "weight", 0),
    (nn.RNNBase, "input_size", "weight_ih_l0", 1),
    (nn.RNNBase, "proj_size", "weight_hr_l0", 0),
    (nn.RNNBase, "hidden_size", "weight_hr_l0", 1),
    (nn.RNNBase, "hidden_size", "weight_hh_l0", 1),
    (nn.RNNCellBase, "input_size", "weight_ih", 1),
    (nn.RNNCellBase, "hidden_size", "weight_hh", 1),
)


def layer_sizes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: Mapping[Attribute, int]
) -> dict[Attribute, int]:
    """Return the size attributes of the layers whose tensors get new `shapes`.

    Args:
        model: before it is cut.
        shapes: the new shapes, by name.
        groups: new values of other attributes, of which those called `groups` matter here.
    """
    found: dict[Attribute, int] = {}
    changed = {name.rpartition(".")[0] for name in shapes}
    for path, module in model.named_modules():
        if path not in changed:
            continue
        prefix = f"{path}." if path else ""
        for kind, attribute, tensor, dim in _SIZES:
            if isinstance(module, kind) and f"{prefix}{tensor}" in shapes:
                found.setdefault(Attribute(path, attribute), shapes[f"{prefix}{tensor}"][dim])
        shape = shapes.get(f"{prefix}weight")
        if isinstance(module, _ConvNd) and shape is not None:
            number = groups.get(Attribute(path, "groups"), plain(module.groups))
            first, second = ("in", "out") if isinstance(module, _ConvTransposeNd) else ("out", "in")
            found[Attribute(path, f"{first}_channels")] = shape[0]
            found[Attribute(path, f"{second}_channels")] = shape[1] * number
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and shape is not None:
            for index, size in enumerate(shape):
                found[Attribute(path, "normalized_shape", index)] = size
    return {a: v for a, v in found.items() if v != _now(model, a)}


def sized_by(model: nn.Module, attribute: Attribute) -> tuple[str, int] | None:
    """Return the tensor of a layer whose size an attribute is, by name, and the dimension."""
    holder = holder_of(model, attribute)
    prefix = f"{attribute.path}." if attribute.path else ""
    for kind, name, tensor, dim in _SIZES:
        there = isinstance(holder, kind) and getattr(holder, tensor, None) is not None
        if there and name == attribute.name:
            return f"{prefix}{tensor}", dim
    if isinstance(holder, _ConvNd) and attribute.name in ("in_channels", "out_channels"):
        is_rows = (attribute.name == "out_channels") != isinstance(holder, _ConvTransposeNd)
        return (f"{prefix}weight", 0 if is_rows else 1) if is_rows or holder.groups == 1 else None
    if isinstance(holder, nn.LayerNorm | nn.RMSNorm) and attribute.name == "normalized_shape":
        return f"{prefix}weight", attribute.index or 0
    return None


def _now(model: nn.Module, attribute: Attribute) -> int:
    value = getattr(model.get_submodule(attribute.path), attribute.name)
    return plain(value if attribute.index is None else value[attribute.index])
