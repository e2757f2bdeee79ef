"""`unshrink`: the full sizes again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parasparse import optim
from parasparse.masks.mask import Mask
from parasparse.names import stored_keys
from parasparse.shrink.cached_results import drop_cached_results
from parasparse.shrink.cutting import check_fits, named_tensors
from parasparse.shrink.parts import restored, spread
from parasparse.shrink.plan import Shrinkage, ShrinkRow
from parasparse.shrink.refusals import check_shrinkable
from parasparse.shrink.undo import Undo, resize_mask, set_size, store
from parasparse.targets.tensors import Target, tensors_of
from parasparse.text import nearest
from parasparse.verbs.sparsify import sparsify


def unshrink(
    model: nn.Module,
    plan: Shrinkage,
    state_dict: Mapping[str, Any] | None = None,
    *,
    optimizer: optim.Optimizers | None = None,
) -> nn.Module:
    """Give a model that `shrink` made smaller its full sizes again; return the model.

    The channels that were removed are 0, and masked, so the model computes what the small one did.
    Constants that `shrink` added to biases stay there. Parameter objects stay; masks of the small
    model become larger.

    Args:
        model: the small model, of any values; changed in place.
        plan: what `plan_shrink` returned before `shrink` changed the model.
        state_dict: of the dense or masked model. The channels that were removed then have its
            values and no mask, for example to be trained again.
        optimizer: one, or a list of them; its state grows too, filled with zeros.

    Raises:
        ValueError: the model does not have the shapes of the small one, or `state_dict` not those
            of the full one.
        RuntimeError, TypeError: see `shrink`.

    Examples:
        >>> import parasparse as ps
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = ps.sparsify(model, {"0": ps.Prune(0.5, pattern=ps.patterns.channel(0))})
        >>> plan = ps.plan_shrink(model, torch.ones(1, 4))
        >>> small = ps.shrink(model, torch.ones(1, 4))
        >>> ps.unshrink(small, plan)[0].weight.shape
        torch.Size([8, 4])
    """
    check_shrinkable(model)
    if not isinstance(plan, Shrinkage):
        raise TypeError(f"`plan` must be a Shrinkage; got {plan!r:.60}. See `Shrinkage.from_json`.")
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict` must be a dict of tensors; got {state_dict!r:.60}.")
    check_fits(model, plan, optimizer, small=True)
    targets = named_tensors(model)
    full = {row.name: _full(row, targets[row.name], state_dict) for row in plan.rows}
    undo = Undo()
    try:
        _grow(model, plan, full, optimizer, undo, filled=state_dict is not None)
        drop_cached_results(model)
        if state_dict is None:
            _mask_the_rest(model, plan)
    except BaseException:
        undo.run()
        raise
    return model


def _full(row: ShrinkRow, target: Target, state_dict: Mapping[str, Any] | None) -> Tensor:
    """Return the values of the full tensor where channels were removed."""
    (small,) = target.originals()
    if state_dict is None:
        return small.new_zeros(row.shape)
    key = next((k for name in target.names for k in stored_keys(name, state_dict)), None)
    if key is None:
        raise ValueError(
            f'`state_dict` must have the tensors of the plan; it has no "{row.name}"'
            f"{nearest(row.name, state_dict)}."
        )
    dense = state_dict[key]
    if not isinstance(dense, Tensor):
        raise TypeError(f'"{key}" of `state_dict` must be a tensor; got {dense!r:.60}.')
    if tuple(dense.shape) != row.shape:
        raise ValueError(
            f'"{key}" of `state_dict` must have the shape {row.shape} of the plan; it has '
            f"{tuple(dense.shape)}. Use a checkpoint from before `shrink`."
        )
    return dense.detach().to(small)


def _grow(
    model: nn.Module, plan: Shrinkage, full: Mapping[str, Tensor], optimizer: Any, undo: Undo,
    *, filled: bool,
) -> None:  # fmt: skip
    targets = named_tensors(model)
    masks: dict[int, Mask] = {}  # a pair has one mask
    for row in plan.rows:
        (tensor,) = targets[row.name].originals()
        for mask in targets[row.name].masks():
            assert isinstance(mask, Mask)
            assert mask.mask is not None
            if id(mask) not in masks:
                masks[id(mask)] = mask
                rest = mask.mask.new_full(row.shape, filled)
                resize_mask(mask, spread(mask.mask, row, rest), undo)
        in_zeros = partial(_in_zeros, row=row)
        if optimizer is not None:
            weights = partial(_restored_in_zeros, row=row)
            undo.steps.append(optim.cut(optimizer, tensor, in_zeros, weights))
        grad = None if tensor.grad is None else in_zeros(tensor.grad) * row.scale
        values = restored(tensor.detach(), row)
        store(tensor, spread(values, row, full[row.name]), grad, undo)
    for attribute in plan.attributes:
        set_size(model, attribute, attribute.old, undo)


def _in_zeros(tensor: Tensor, row: ShrinkRow) -> Tensor:
    layout: Any = {"dtype": tensor.dtype, "device": tensor.device}
    return spread(tensor, row, torch.zeros(row.shape, **layout))


def _restored_in_zeros(tensor: Tensor, row: ShrinkRow) -> Tensor:
    return _in_zeros(restored(tensor, row), row)


def _mask_the_rest(model: nn.Module, plan: Shrinkage) -> None:
    """Mask what was removed from tensors that have no mask."""
    rows = {row.name: row for row in plan.rows}
    rules: dict[str, Tensor] = {}
    pairs = all(_lost_alike(target, rows) for target in tensors_of(model) if target.is_pair)
    for target in tensors_of(model, pairs=pairs):
        row = next((rows[name] for name in target.names if name in rows), None)
        if row is not None and not target.is_buffer and not target.masks():
            kept = torch.ones(row.new_shape, dtype=torch.bool, device="cpu")
            rules[target.name] = _in_zeros(kept, row)
    if rules:
        sparsify(model, rules, pairs=pairs)


def _lost_alike(pair: Target, rows: Mapping[str, ShrinkRow]) -> bool:
    """Whether the same channels were removed from both components, so that one mask fits."""
    kept = [rows[name].kept for name in pair.names if name in rows]
    return not kept or kept[:1] == kept[1:]
