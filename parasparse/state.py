"""Checkpoints: dense ones into sparse models and back, and those of other libraries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from parasparse import _attach
from parasparse._apply_mask import apply_mask
from parasparse._checks import listed, nearest
from parasparse._found_masks import attach_found
from parasparse._fsdp import is_sharded
from parasparse._parts import is_spread, spread_like
from parasparse._stack import original_names
from parasparse._tensors import PAIR_ENDINGS, named_modules
from parasparse.parametrizations import as_mask
from parasparse.sparse._headers import FORMAT
from parasparse.transforms import unsparsify


def dense_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Return the `state_dict` that the squashed model would have; `model` stays as it is.

    Values are detached. Those that are not masked are the model's own, as in `state_dict`; tensors
    that are tied in the model are tied in the result.

    Raises:
        RuntimeError: a mask is not set.

    Examples:
        >>> from parasparse import sparsify
        >>> list(dense_state_dict(sparsify(nn.Linear(2, 2), 0.5)))
        ['weight', 'bias']
    """
    state = model.state_dict()
    renamed: dict[str, Any] = {}
    tied: dict[tuple[int, ...], Tensor] = {}
    for plain, name, module, _ in named_modules(model):
        for attr, stack in _attach.masked_stacks(module):
            own = (*_attach.originals(module, attr), stack.mask)
            key = tuple(map(id, own))
            if key not in tied:
                tied[key] = _attach.effective(module, attr).detach()
            for where in dict.fromkeys((name, plain)):  # some wrappers leave their names out
                prefix = f"{where}." if where else ""
                inside = f"{prefix}parametrizations.{attr}."
                if any(f"{inside}{held}" in state for held in original_names(stack)):
                    renamed[f"{prefix}{attr}"] = tied[key]
                for gone in [k for k in state if k.startswith(inside)]:
                    del state[gone]
    every = {**state, **renamed}
    first = [key for key in _dense_order(model) if key in every]
    # What a module's own state_dict hook has added or renamed is not ours to order.
    rest = [key for key in every if key not in set(first)]
    result: OrderedDict[str, Tensor] = OrderedDict((key, every[key]) for key in [*first, *rest])
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        kept = {k: v for k, v in metadata.items() if "parametrizations" not in k.split(".")}
        result._metadata = OrderedDict(kept)  # type: ignore[attr-defined]
    return result


def _dense_order(model: nn.Module) -> Iterable[str]:
    for plain, name, module, _ in named_modules(model):
        parameters, buffers = _attach.tensor_names(module)
        held = [*parameters, *module._parameters, *buffers, *module._buffers, "_extra_state"]
        if is_parametrized(module):  # what stays parametrized is a child like any other
            inside = module.get_submodule("parametrizations").state_dict()
            held += [f"parametrizations.{own}" for own in inside]
        for own in held:
            yield from dict.fromkeys(f"{where}.{own}".lstrip(".") for where in (name, plain))


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True, assign: bool = False
) -> Any:
    """Attach what `state_dict` has masks for, then load it; return the missing and unexpected keys.

    Reads dense checkpoints, ours, those of torch.nn.utils.prune (`weight_orig`, `weight_mask`) and
    of cplxmodule (`weight`, or `weight.real` and `weight.imag`, with `mask`; None unsets).

    Args:
        model: dense or with masks; changed in place.
        state_dict: not changed.
        strict: as for `torch.nn.Module.load_state_dict`.
        assign: likewise.

    Raises:
        TypeError, ValueError: it is no state dict; it is what a packed file holds.
        RuntimeError: keys or shapes do not match. Masks attached for the load are taken off again;
            values that torch had copied by then stay, as they do in its own `load_state_dict`.

    Examples:
        >>> from parasparse import sparsify
        >>> checkpoint = sparsify(nn.Linear(2, 2), 0.5).state_dict()
        >>> model = nn.Linear(2, 2)
        >>> load_state_dict(model, checkpoint), int((model.weight != 0).sum())
        (<All keys matched successfully>, 2)
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a state dict; got {type(state_dict).__name__}. Of a file: "
            "torch.load(path), or load_packed(path)."
        )
    if state_dict.get("format") == FORMAT:
        raise ValueError("`state_dict` must be a state dict; this is a packed file: load_packed.")
    state = dict(state_dict)
    values = [value for value in state.values() if isinstance(value, Tensor)]
    if is_sharded(model) and not any(is_spread(value) for value in values):
        raise RuntimeError(
            "`state_dict` must be sharded as the model is; this one is whole. Use "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict with "
            "StateDictOptions(full_state_dict=True), after `sparsify`."
        )
    attached = attach_found(model, state)
    try:
        return model.load_state_dict(state, strict=strict, assign=assign)
    except BaseException:
        if attached:
            unsparsify(model, attached)
        raise


def binarize_masks(
    state_dict: Mapping[str, Any], masks: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return new dicts: the weights times their masks, without -0.0; the masks as bool, `!= 0`.

    Args:
        state_dict: dense (`layer.weight`), complex in parts (`layer.weight.real` and `.imag`), or
            of a masked model (`layer.parametrizations.weight.original`); masks in it are made bool
            as well.
        masks: by the names that `deploy_masks` takes; each broadcasts to its weight. A mask given
            as None is left out.

    Raises:
        ValueError: a key of `masks` belongs to no weight of `state_dict`.
        RuntimeError: a mask's shape does not match.

    Examples:
        >>> weights = {"weight": torch.tensor([-1.0, 2.0])}
        >>> state, masks = binarize_masks(weights, {"weight": [0.0, 0.5]})
        >>> state["weight"].tolist(), masks["weight"].tolist()
        ([0.0, 1.0], [False, True])

    Reference: cplxmodule, `nn.masked.binarize_masks`. Differs: negative entries count as kept.
    """
    result = dict(state_dict)
    bools: dict[str, Tensor] = {}
    unknown = [
        key for key, mask in masks.items() if mask is not None and not _weights_of(key, result)
    ]
    if unknown:
        raise ValueError(
            f"`masks` must belong to weights of `state_dict`; {listed(unknown)} do not"
            f"{nearest(unknown[0], result)}."
        )
    folded: set[str] = set()
    for key, mask in masks.items():
        if mask is None:
            continue
        names = _weights_of(key, result)
        if folded & set(names):
            raise ValueError(f'`masks` must name each weight once; "{key}" names one again.')
        for name in names:
            weight = state_dict[name]
            full = as_mask(mask, weight.shape, weight.dtype).to(weight.device)
            product = apply_mask(weight.detach(), spread_like(full, weight))
            for twin in _twins(name, state_dict):  # the other names of a tied tensor
                result[twin] = product
                folded.add(twin)
        bools[key] = torch.as_tensor(mask) != 0
        for held in [h for name in {*_weight_names(key), *folded} for h in _mask_names(name)]:
            if result.get(held) is not None:
                result[held] = result[held] != 0
    return result, bools


def _weights_of(key: str, state: Mapping[str, Any]) -> list[str]:
    """Return the tensors of `state` that mask `key` of a dict of masks is for."""
    for name in _weight_names(key):
        layer, dot, attr = name.rpartition(".")
        inside = f"{layer}{dot}parametrizations.{attr}"
        pairs = [
            (f"{start}{real}{end}", f"{start}{imag}{end}")
            for start, end in ((name, ""), (inside, ".original"))
            for real, imag in PAIR_ENDINGS
        ]
        pairs += [(f"{name}.real", f"{name}.imag")]
        below = f"{name}.parametrizations"
        pairs += [(f"{below}.real.original", f"{below}.imag.original")]
        for group in [(name,), (f"{inside}.original",), (f"{name}_orig",), *pairs]:
            if all(member in state for member in group):
                return list(group)
    return []


def _twins(name: str, state: Mapping[str, Any]) -> list[str]:
    """Return the names in `state` of the very tensor that is called `name`."""
    weight = state[name]
    same = [
        key
        for key, other in state.items()
        if isinstance(other, Tensor)
        and (other.data_ptr(), other.shape, other.stride())
        == (weight.data_ptr(), weight.shape, weight.stride())
    ]
    return same if weight.numel() and not weight.is_meta else [name]


def _weight_names(key: str) -> list[str]:
    """Return the weights that `key` may name: layer.weight for layer, layer.mask and so on."""
    names = [key]
    for ending in ("_mask", ".mask"):
        names += [key.removesuffix(ending)] if key.endswith(ending) else []
    layers = [*names, ""] if key == "mask" else names
    return [*names, *(f"{layer}.weight".removeprefix(".") for layer in layers)]


def _mask_names(key: str) -> list[str]:
    """Return what a state dict may call the mask that `key` names."""
    names = []
    for name in _weight_names(key):
        layer, dot, attr = name.rpartition(".")
        names += [f"{name}_mask", f"{layer}{dot}parametrizations.{attr}.0.mask"]
        names += [name.removesuffix(".original") + ".0.mask"] if attr == "original" else []
        names += [f"{layer}{dot}mask"] if attr == "weight" else []
    return names
