"""The module between a stored tensor and the masked tensor that a layer reads."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from parasparse.dtypes import widened
from parasparse.masks.apply import apply_mask, apply_mask_straight_through
from parasparse.masks.convert import as_mask, real_dtype
from parasparse.masks.hooks import is_hooked
from parasparse.sharding.dtensors import PLAIN, is_dtensor, laid_out_like, to_local

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Mask(nn.Module):
    """Passes entries through bit for bit where the mask is True; all others become +0.0.

    The mask is the persistent buffer `mask`, with the tensor's shape, device and memory format. It
    is bool (1 byte per entry) if its entries are all 0 or 1. Otherwise it has the tensor's dtype
    (float32 for float8, the dtype of the components if complex), and multiplies. `mask = None`
    unsets it, and reading with an unset mask raises RuntimeError. After `distributed.shard_masks`
    the mask is a Parameter without gradient, which `fully_shard` shards.

    Attributes:
        dense_gradient: if True, dropped entries of a bool mask get a gradient too, which growth by
            momentum needs. Not in the state dict.
        zeroed_in_place: ids of Parameters into which training on a CPU with dense gradients may
            write the zeros. It then reads the Parameter itself, which takes less time and memory
            than a masked copy. A copy of this module still makes masked copies.

    Args:
        like: the tensor to be masked, which gives the shape, dtype, device and memory format.
        mask: see `mask_`.

    Examples:
        >>> half = Mask(torch.ones(2, 2), [[True], [False]])
        >>> half(torch.full((2, 2), 3.0)).tolist()
        [[3.0, 3.0], [0.0, 0.0]]

    Reference: the masked layers of cplxmodule (`nn.masked`). Differs: assigning copies the mask.
    """

    mask: Tensor | None
    dense_gradient: bool = False
    zeroed_in_place: frozenset[int] = frozenset()

    def __init__(self, like: Tensor, mask: object = None) -> None:
        super().__init__()
        self.register_buffer("mask", None)
        self._shape = like.shape
        # The dtype, device and memory format of the next mask; it follows `.to()` as weights do.
        example = torch.empty((2,) * like.ndim, dtype=real_dtype(like.dtype), device=like.device)
        self._like = example.contiguous(memory_format=memory_format_of(like))
        self.mask_(mask)

    @property
    def is_bool(self) -> bool:
        """Whether the mask is set and bool, so that it does not scale."""
        return self.mask is not None and self.mask.dtype == torch.bool

    def mask_(self, mask: object, *, copy: bool = True) -> Self:
        """Set the mask to a copy of `mask`, broadcast and converted; return this module.

        Args:
            mask: a tensor, array, nested list or number that is bool, integer or real and
                broadcasts to the tensor's shape; None unsets the mask.
            copy: if False, `mask` itself may become the mask.

        Raises:
            RuntimeError: the shape does not broadcast; or the mask is sharded and would be unset or
                change its dtype.
            TypeError: `mask` is complex, or not an array of numbers.
            ValueError: `mask` contains NaN, inf, or values that the tensor's dtype rounds to inf or
                0.
        """
        held: Any = self._buffers if "mask" in self._buffers else self._parameters
        now = held["mask"]
        if mask is None:
            self._check_replaced(now, None)
            held["mask"] = None
            return self
        with torch.inference_mode(False), torch.no_grad():
            value = as_mask(mask, self._shape, self._like.dtype)
            value = value if now is None else laid_out_like(value, now)
            value = value.to(self._like.device)
            if now is not None and now.dtype == value.dtype and now.device == value.device:
                # In place, because compiled graphs, DDP and FSDP hold this tensor.
                old, new = to_local(now), to_local(value)
                same = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                old.copy_(new.clone() if same else new)
                return self
            self._check_replaced(now, value.dtype)
            memory_format = memory_format_of(self._like)
            if copy or value.is_inference() or not value.is_contiguous(memory_format=memory_format):
                value = _copied(value, memory_format)
            held["mask"] = nn.Parameter(value, False) if held is self._parameters else value
        return self

    def as_parameter_(self) -> None:
        """Make the mask a Parameter without gradient instead of a buffer."""
        if "mask" in self._buffers:
            mask = self._buffers.pop("mask")
            assert mask is not None
            self.register_parameter("mask", nn.Parameter(mask, requires_grad=False))

    def _check_replaced(self, now: Tensor | None, dtype: torch.dtype | None) -> None:
        if now is not None and "mask" in self._parameters and is_dtensor(now):
            kind = "unset" if dtype is None else str(dtype)
            raise RuntimeError(
                f"a mask that `fully_shard` has sharded must stay {now.dtype}; it would become "
                f"{kind}. To change its kind, keep masks whole by not calling `shard_masks`."
            )

    def resize_(self, mask: Tensor) -> None:
        """Replace the mask by one of another shape, because the tensor has a new shape."""
        held: Any = self._buffers if "mask" in self._buffers else self._parameters
        fits = held is self._buffers or isinstance(mask, nn.Parameter)
        held["mask"] = mask if fits else nn.Parameter(mask, False)
        self._shape = mask.shape

    def forget_(self, device: torch.device) -> None:
        """Unset the mask. The next one will be on `device`."""
        self._like = torch.empty_like(self._like, device=device)
        self.mask_(None)

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` masked."""
        # Not `self.mask`, which is a Proxy while torch.fx traces.
        held: Any = self._buffers if "mask" in self._buffers else self._parameters
        mask = held["mask"]
        if mask is None:
            raise RuntimeError(
                f"this tensor of shape {tuple(self._shape)} has no sparsity mask. Set one "
                "with `deploy_masks` or `Mask.mask_` (`torch.tensor(1.)` keeps everything), or "
                "remove the masking with `unsparsify`."
            )
        plain = type(weight) in PLAIN and type(mask) in PLAIN
        if not plain and isinstance(weight, Tensor):  # a Proxy of torch.fx is not a tensor
            mask = laid_out_like(mask, weight)
        if self.dense_gradient:
            in_place = not torch.compiler.is_compiling() and id(weight) in self.zeroed_in_place
            return apply_mask_straight_through(weight, mask, in_place=in_place)
        return apply_mask(weight, mask)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return `weight` masked, and run hooks if there are any."""
        return super().__call__(weight) if is_hooked(self) else self.forward(weight)

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return the tensor to store: `value` where the mask keeps entries, `stored` elsewhere.

        `value` is divided by a real mask, so that the tensor then reads as `value`.

        Raises:
            RuntimeError: the mask is not set.
        """
        mask = self.mask
        if mask is None:
            raise RuntimeError(
                "a tensor with an unset mask cannot be assigned to. Set its mask first, with "
                "`deploy_masks` or `Mask.mask_`."
            )
        mask, value = laid_out_like(mask, stored), laid_out_like(value, stored)
        if mask.dtype != torch.bool:
            value = widened(value).to(stored.device) / mask
        return torch.where(mask != 0, value.to(stored), stored)

    def fold_(self, keep: Tensor | None = None) -> None:
        """Make the mask bool after its scale has been folded into a weight.

        `keep` is the new bool mask; None keeps the entries where the mask is not 0.
        """
        if self.mask is not None:
            self.mask_(self.mask != 0 if keep is None else keep)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`, which torch's `register_parametrization` then stores."""
        return value

    def extra_repr(self) -> str:
        """Return the shape and the dtype of the mask."""
        kind = "unset" if self.mask is None else str(self.mask.dtype).removeprefix("torch.")
        return f"{tuple(self._shape)}, {kind}"

    def __setattr__(self, name: str, value: Any) -> None:
        is_swapped = isinstance(value, nn.Parameter)  # by FSDP
        if name == "mask" and not is_swapped and "_like" in self.__dict__:
            self.mask_(value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        had_values = self.mask is None or not self.mask.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        if not had_values and self.mask is not None and not self.mask.is_meta:
            self.mask_(None)  # `to_empty` has given it memory, but no values
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load any mask that `mask_` accepts. None unsets it; a missing key changes nothing."""
        local_metadata, strict, _, unexpected_keys, error_msgs = rest
        key = prefix + "mask"
        if key in state_dict:
            value = state_dict[key]
            if local_metadata.get("assign_to_params_buffers", False) and value is not None:
                self._like = torch.empty_like(self._like, device=value.device)
            try:
                self.mask_(value)
            except (RuntimeError, TypeError, ValueError) as error:
                error_msgs.append(f"While loading the mask {key}: {error}")
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k != key]


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return channels_last(_3d) if `tensor` is laid out so and not contiguous."""
    channels_last = _CHANNELS_LAST.get(tensor.ndim)
    if channels_last is None or tensor.is_contiguous():
        return torch.contiguous_format
    fits = tensor.is_contiguous(memory_format=channels_last)
    return channels_last if fits else torch.contiguous_format


def _copied(mask: Tensor, memory_format: torch.memory_format) -> Tensor:
    if is_dtensor(mask):
        return mask.clone()
    new = torch.empty_like(mask, memory_format=torch.contiguous_format)
    return new.contiguous(memory_format=memory_format).copy_(mask)
