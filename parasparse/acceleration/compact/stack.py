"""The parametrizations of a weight of which only the kept values exist.

module.parametrizations.weight.original        the kept values, one dimension
module.parametrizations.weight.0.starts        their places; see `Places`
module.parametrizations.weight.0.columns
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from parasparse.acceleration.compact.uses import Recorder
from parasparse.acceleration.compact.weight import CompactWeight
from parasparse.attach.stack import MaskedParametrizationList
from parasparse.attach.storing import give
from parasparse.masks.apply import is_tracing
from parasparse.masks.places import Kept, Places, check_places
from parasparse.sharding.dtensors import is_dtensor


class CompactParametrizationList(MaskedParametrizationList):
    """Reads a `CompactWeight` of its kept values."""

    is_compact: ClassVar[bool] = True
    recorder: Recorder | None = None  # inside `recorded`

    def __init__(self, values: nn.Parameter, places: Places, mask: Kept) -> None:
        super().__init__(values, places)
        self.add_module("1", mask)

    @property
    def places(self) -> Places:
        """Where the values are."""
        return self[0]  # type: ignore[return-value]

    def forward(self) -> Tensor:
        """Return the weight."""
        if self.stand_in is not None:  # which records what is multiplied, for `summary`
            return self._value_of(self.stand_in)
        if self.frozen is not None:
            return self._frozen_value(self.frozen)
        self.check_whole()
        if _needs_plain_tensors(self.original):
            return self.places.traced(self.original)
        return CompactWeight(self.original, self.places, self.recorder)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "recorder"}

    def stored(self) -> Tensor:
        """Return the dense weight."""
        self.check_whole()
        return super().stored()

    def check_whole(self) -> None:
        """Raise RuntimeError if the values are sharded over processes."""
        if is_dtensor(self.original):
            raise RuntimeError(
                "a compact weight must not be sharded. Call parasparse.expand(model) before "
                "`fully_shard` or `parallelize_module`."
            )

    def right_inverse(self, value: Tensor) -> None:
        """Copy `value` into the kept values; see the base class."""
        super().right_inverse(value.plain() if isinstance(value, CompactWeight) else value)

    def swap(self, value: Any) -> NoReturn:
        """Refuse, because what `functional_call` would put back has only kept values."""
        raise RuntimeError(
            "`functional_call` must not swap a compact weight. Use the key "
            "'parametrizations.<name>.original' with its kept values, or call "
            "parasparse.expand(model) first."
        )

    def retie(self, parameter: nn.Parameter) -> None:
        """Refuse a Parameter, because it would be dense."""
        if parameter is not self.original:
            raise RuntimeError(
                "a compact weight cannot be tied to a Parameter. Call parasparse.expand(model) "
                "first, or assign a plain tensor, which is copied."
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load values and places together. There may be more or fewer of them than now."""
        keys = [f"{prefix}{own}" for own in ("original", "0.starts", "0.columns")]
        if all(key in state_dict for key in keys):
            values, starts, columns = (state_dict[key] for key in keys)
            local_metadata, *_, error_msgs = rest
            try:
                check_places(values, starts, columns, self.places.shape)
            except ValueError as error:
                error_msgs.append(f'While loading "{prefix}": {error}')
                return
            is_assigned = local_metadata.get("assign_to_params_buffers", False)
            self._resize(values, starts, columns, copy=not is_assigned)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _resize(self, values: Tensor, starts: Tensor, columns: Tensor, *, copy: bool) -> None:
        """Take the places, and as many values as there are in `values`."""
        device = self.places.starts.device if copy else values.device
        self.places.put_(*(each.to(device, copy=copy) for each in (starts, columns)))
        if self.original.shape != values.shape:
            give(self.original, self.original.detach().new_zeros(values.shape), None)


def _needs_plain_tensors(values: Tensor) -> bool:
    """Whether an exporter, a tracer or FakeTensorMode is running, which see dense values."""
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag
    return is_tracing() or isinstance(values, Proxy) or type(torch.empty(0)) is not Tensor
