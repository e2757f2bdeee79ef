"""`compact` and `expand`: store masked weights as their kept entries alone, and undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from parasparse import optim
from parasparse.acceleration.compact.stack import CompactParametrizationList
from parasparse.attach.accelerated import check_not_accelerated
from parasparse.attach.offloading import check_not_offloaded
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.attach.storing import give
from parasparse.masks.mask import Mask
from parasparse.masks.places import Kept, Places
from parasparse.sharding.dtensors import PLAIN
from parasparse.targets.reach import Specs, masked_targets
from parasparse.targets.tensors import Site, Target


def compact(model: nn.Module, targets: Specs | None = None, *, optimizer: Any = None) -> nn.Module:
    """Store masked weights as their kept entries alone, which multiply and train sparsely.

    The stored Parameter of each weight stays the same object and becomes one-dimensional: the kept
    values, row by row. Their places are buffers beside it. There is no dense weight, mask or
    gradient any more, and the optimizer's state is as small as the values. Linear layers and what
    is built on them, convolutions with a kernel of one, attention, RNN, LSTM and GRU multiply
    sparsely, forward and backward. Any other use of the weight computes its dense values.

    Args:
        model: a model with bool masks; changed in place.
        targets: masked tensors, one target of a rule or a list of them; None: all with two or more
            dimensions.
        optimizer: the optimizer or optimizers of the model, whose state is cut to the kept entries.
            None: build the optimizer afterwards.

    Raises:
        RuntimeError: a mask is not set or not bool; a weight is computed by another
            parametrization, sharded or offloaded; or the model is wrapped in DDP, which must come
            afterwards. The model is unchanged, as after any error.
        TypeError: the state of the optimizer cannot be cut; see `optim.cut`. Or the optimizer is an
            Adafactor or a Muon, which step matrices in another way than vectors.
        ValueError: a target reaches no masked tensor, or one with fewer than two dimensions.

    Examples:
        >>> model = compact(sparsify(nn.Linear(10, 10), 0.9))
        >>> model.parametrizations.weight.original.shape
        torch.Size([10])
    """
    chosen = chosen_targets(model, targets)
    chosen = [target for target in chosen if not target.is_compact]
    for target in chosen:
        check_can_be_compact(target)
    _check_optimizer(optimizer, chosen)
    for target in chosen:
        (mask,) = target.masks()
        assert isinstance(mask, Mask)
        assert mask.mask is not None
        places = Places.of(mask.mask)
        _replace(target, places.right_inverse, optimizer, _list_of(places))
    return model


def expand(model: nn.Module, targets: Specs | None = None, *, optimizer: Any = None) -> nn.Module:
    """Undo `compact`: store dense weights with masks again.

    The stored Parameter stays the same object and gets its dense shape back, contiguous. Entries
    that the mask drops are 0, as is their state in the optimizer.

    Args:
        model: changed in place. Weights that are not compact do not change.
        targets: see `compact`.
        optimizer: see `compact`.

    Raises:
        RuntimeError: a weight is sharded, or the model is wrapped in DDP. The model is unchanged.
        TypeError: see `compact`.
        ValueError: a target reaches no masked tensor.

    Examples:
        >>> model = expand(compact(sparsify(nn.Linear(10, 10), 0.9)))
        >>> model.parametrizations.weight.original.shape
        torch.Size([10, 10])
    """
    chosen = [target for target in chosen_targets(model, targets) if target.is_compact]
    _check_optimizer(optimizer, chosen)
    for stack in (site.stack() for target in chosen for site in target.sites):
        assert isinstance(stack, CompactParametrizationList)
        stack.check_whole()
    for target in chosen:
        expand_target(target, optimizer)
    return model


def expand_target(target: Target, optimizer: Any = None) -> None:
    """Store dense weights with a mask again."""
    stack = target.firsts[0].stack()
    assert isinstance(stack, CompactParametrizationList)
    places = stack.places
    _replace(target, places.forward, optimizer, _masked_list_of(places))


def chosen_targets(model: nn.Module, targets: Specs | None) -> list[Target]:
    """Return the masked weights that `targets` reach; raise as `compact` does."""
    check_not_accelerated(model)
    check_not_wrapped(model)
    chosen = masked_targets(model, targets)
    if targets is None:
        return [target for target in chosen if len(target.shape) > 1]
    flat = [target.name for target in chosen if len(target.shape) < 2]
    if flat:
        raise ValueError(
            f'a compact tensor must have two dimensions or more; "{flat[0]}" has fewer. Leave it '
            "out of `targets`."
        )
    return chosen


def check_not_wrapped(model: nn.Module) -> None:
    """Raise RuntimeError if a wrapper in `model` keeps the shapes of its Parameters."""
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            raise RuntimeError(
                f"`model` must not be wrapped in {type(module).__name__}, which keeps the shapes "
                "of its Parameters. Pass its `.module`, and wrap the model afterwards."
            )


def check_can_be_compact(target: Target) -> None:
    """Raise RuntimeError if a weight cannot become compact."""
    masks = target.masks()
    if len(masks) > 1 or not target.has_bool_mask:
        raise RuntimeError(
            f'"{target.name}" must have one bool mask that is set; got '
            f"{', '.join(map(repr, masks))}. Set it with `deploy_masks`, or call `binarize`."
        )
    for site in target.sites:
        check_not_offloaded(site.module, site.attr, target.name)
        masked = site.mask_module() is not None
        stored, *more = site.originals()
        if not masked or type(site.stack()) is not MaskedParametrizationList:
            what = "under a gate, or tied to a tensor without a mask"
        elif more or site.stack().below():
            what = f"parametrized by {type(site.stack()[0]).__name__}"
        elif type(stored) not in PLAIN or not isinstance(stored, nn.Parameter):
            what = f"a {type(stored).__name__}"
        else:
            continue
        raise RuntimeError(
            f'"{target.name}" must be an ordinary Parameter below its mask to become compact; it '
            f"is {what}. Leave it out of `targets`."
        )
    if any(tensor.is_meta for tensor in target.originals()):
        raise RuntimeError(
            f'"{target.name}" is on the meta device, so it has no values to keep. Call '
            "`materialize` instead of `sparsify` and `compact`, or load a checkpoint first."
        )


def _check_optimizer(optimizer: Any, chosen: list[Target]) -> None:
    if optimizer is not None:
        tensors = [tensor for target in chosen for tensor in target.originals()]
        _check_has_no_matrices(optimizer, tensors)
        optim.check_cuttable(optimizer, tensors)


def _check_has_no_matrices(optimizer: Any, tensors: list[Tensor]) -> None:
    """Raise TypeError if the optimizer steps matrices in another way than vectors."""
    ids = {id(tensor) for tensor in tensors}
    for each in optim.each_optimizer(optimizer):
        kind = type(each).__name__
        if kind in ("Adafactor", "Muon") and any(
            id(tensor) in ids for group in each.param_groups for tensor in group["params"]
        ):
            raise TypeError(
                f"{kind} steps matrices in another way than the one-dimensional values of compact "
                "weights. Leave `optimizer` out, and build a new one afterwards."
            )


def _replace(
    target: Target,
    changed: Callable[[Tensor], Tensor],
    optimizer: Any,
    stack_of: Callable[[nn.Parameter], MaskedParametrizationList],
) -> None:
    """Change the stored Parameters, their gradients and states, and their parametrizations."""
    for sites in target.components:
        (parameter,) = sites[0].originals()
        assert isinstance(parameter, nn.Parameter)
        with torch.no_grad():
            if optimizer is not None:
                optim.cut(optimizer, parameter, changed)
            grad = None if parameter.grad is None else changed(parameter.grad)
            give(parameter, changed(parameter.detach()), grad)
            for site in sites:
                _put(site, stack_of(parameter))


def _put(site: Site, stack: MaskedParametrizationList) -> None:
    stack.train(site.module.training)
    container: Any = site.module._modules["parametrizations"]
    container._modules[site.attr] = stack


def _list_of(places: Places) -> Callable[[nn.Parameter], MaskedParametrizationList]:
    mask = Kept(places)  # one for all sites
    return lambda values: CompactParametrizationList(values, places, mask)


def _masked_list_of(places: Places) -> Callable[[nn.Parameter], MaskedParametrizationList]:
    mask: list[Mask] = []  # one for all sites, of the dtype of the weight

    def make(weight: nn.Parameter) -> MaskedParametrizationList:
        if not mask:
            mask.append(Mask(weight, places.mask()))
        return MaskedParametrizationList(weight, mask[0])

    return make
