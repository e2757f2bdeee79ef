"""The module that stands between a stored tensor and the masked tensor that a module sees."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from parasparse.masks.apply import apply_mask, apply_mask_straight_through
from parasparse.masks.convert import as_mask, real_dtype
from parasparse.masks.hooks import is_hooked
from parasparse.sharding.dtensors import is_dtensor, laid_out_like, to_local


class Mask(nn.Module):
    """Passes the entries of a tensor whose mask is True bit for bit; the others become +0.0.

    The mask is the persistent buffer `mask`, of the tensor's shape, device and memory format: bool
    (1 byte an entry) where its entries are all 0 or 1, else real in the tensor's dtype, and then it
    multiplies. `mask = None` unsets it; an unset mask refuses to be read. After
    `distributed.shard_masks` it is a Parameter without gradient, which `fully_shard` shards.

    Attributes:
        dense_gradient: masked entries of a bool mask get their gradient too, as dynamic sparse
            training by momentum wants it. Not in the state.
        zeroed_in_place: the ids of Parameters whose masked entries are kept at 0: where gradients
            are dense, training on a CPU writes the zeros into them and reads the Parameter itself,
            which takes less time and memory than a masked copy. A copy of the module makes copies.

    Args:
        like: the tensor to be masked; gives shape, dtype, device and memory format.
        mask: as for `mask_`.

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
        # Says where and how a mask that is not set now will be: it follows `.to()` as weights do.
        self._like = torch.empty((2,) * like.ndim, dtype=real_dtype(like.dtype), device=like.device)
        if _is_channels_last(like):
            self._like = self._like.contiguous(memory_format=_CHANNELS_LAST[like.ndim])
        self.mask_(mask)

    def mask_(self, mask: object, *, copy: bool = True) -> Self:
        """Set the mask to a copy of `mask`, broadcast and converted; return this module.

        Args:
            mask: bool, integer or real; tensor, array, nested list or number that broadcasts to the
                tensor's shape; None unsets.
            copy: False lets `mask` itself become the mask.

        Raises:
            RuntimeError: the shape does not broadcast; or the mask is sharded, and it would be
                unset, or turn from bool to real.
            TypeError: the mask is complex.
            ValueError: the mask holds NaN, inf, or what the tensor's dtype rounds to inf or 0.
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
                # In place: compiled graphs, DDP and FSDP hold this very one, perhaps the source.
                old, new = to_local(now), to_local(value)
                same = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                old.copy_(new.clone() if same else new)
                return self
            self._check_replaced(now, value.dtype)
            if copy or not self._fits(value):
                value = self._copied(value)
            held["mask"] = nn.Parameter(value, False) if held is self._parameters else value
        return self

    def as_parameter_(self) -> None:
        """Keep the mask as a Parameter without gradient rather than as a buffer."""
        if "mask" in self._buffers:
            mask = self._buffers.pop("mask")
            assert mask is not None
            self.register_parameter("mask", nn.Parameter(mask, requires_grad=False))

    def _check_replaced(self, now: Tensor | None, dtype: torch.dtype | None) -> None:
        if now is not None and "mask" in self._parameters and is_dtensor(now):
            kind = "unset" if dtype is None else f"of {dtype}"
            raise RuntimeError(
                f"a mask that `fully_shard` has sharded must stay {now.dtype}; it would be {kind}. "
                "Keep masks whole on each process (no `shard_masks`) to change their kind."
            )

    def _fits(self, mask: Tensor) -> bool:
        """Whether `mask` can be the mask itself, laid out in memory as this tensor is."""
        if mask.is_inference():
            return False
        if _is_channels_last(self._like):
            return mask.is_contiguous(memory_format=_CHANNELS_LAST[mask.ndim])
        return mask.is_contiguous()

    def _copied(self, mask: Tensor) -> Tensor:
        if is_dtensor(mask):
            return mask.clone()
        new = torch.empty_like(mask, memory_format=torch.contiguous_format)
        if _is_channels_last(self._like):
            new = new.contiguous(memory_format=_CHANNELS_LAST[new.ndim])
        return new.copy_(mask)

    def forget_(self, device: torch.device) -> None:
        """Unset the mask; the next one will be on `device`."""
        self._like = torch.empty_like(self._like, device=device)
        self.mask_(None)

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight` masked."""
        # The tensor itself, also while torch.fx traces.
        held: Any = self._buffers if "mask" in self._buffers else self._parameters
        mask = held["mask"]
        if mask is None:
            raise RuntimeError(
                f"this tensor of shape {tuple(self._shape)} has no sparsity mask. Set one "
                "(`deploy_masks`, `Mask.mask_`; `torch.tensor(1.)` keeps everything), or take the "
                "masking off with `unsparsify`."
            )
        if type(weight) not in _PLAIN or type(mask) not in _PLAIN:
            mask = _laid_out_like(mask, weight)
        if self.dense_gradient:
            in_place = not torch.compiler.is_compiling() and id(weight) in self.zeroed_in_place
            return apply_mask_straight_through(weight, mask, in_place=in_place)
        return apply_mask(weight, mask)

    def __call__(self, weight: Tensor) -> Tensor:
        """Return `weight` masked, and run hooks where there are some."""
        return super().__call__(weight) if is_hooked(self) else self.forward(weight)

    def merged(self, value: Tensor, stored: Tensor) -> Tensor:
        """Return what to store so that kept entries read as `value`, and dropped ones stay."""
        mask = self.mask
        if mask is None:
            raise RuntimeError("a tensor that has no sparsity mask cannot be assigned to.")
        mask, value = laid_out_like(mask, stored), laid_out_like(value, stored)
        if mask.dtype != torch.bool:
            value = value.to(torch.float32) if value.dtype.itemsize == 1 else value  # no float8 /
            value = value.to(stored.device) / mask
        return torch.where(mask != 0, value.to(stored), stored)

    def fold_(self, keep: Tensor | None = None) -> None:
        """Make the mask bool, after its scale has been folded into a weight.

        Args:
            keep: bool, the mask from now on; None: where it is not 0.
        """
        if self.mask is not None:
            self.mask_(self.mask != 0 if keep is None else keep)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value`: what a stock `register_parametrization` stores."""
        return value

    def extra_repr(self) -> str:
        """Return the shape, and the kind of mask that is set."""
        kind = "unset" if self.mask is None else str(self.mask.dtype).removeprefix("torch.")
        return f"{tuple(self._shape)}, {kind}"

    def __setattr__(self, name: str, value: Any) -> None:
        named = name == "mask" and not isinstance(value, nn.Parameter)  # which FSDP swaps
        if named and "_like" in self.__dict__:
            self.mask_(value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load any mask that `mask_` takes; None unsets, and what is missing stays as it is."""
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


def _is_channels_last(tensor: Tensor) -> bool:
    memory_format = _CHANNELS_LAST.get(tensor.ndim)
    return (
        memory_format is not None
        and tensor.is_contiguous(memory_format=memory_format)
        and not tensor.is_contiguous()
    )


_PLAIN = (Tensor, nn.Parameter)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _laid_out_like(mask: Tensor, weight: Tensor) -> Tensor:
    """Return `mask` spread over processes as `weight` is; a Proxy of torch.fx is no tensor yet."""
    if not isinstance(weight, Tensor):
        return mask
    return laid_out_like(mask, weight)
