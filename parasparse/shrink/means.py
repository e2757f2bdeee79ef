"""Follows a mean over channels to the weight that can make up for its change, as in an RMSNorm.

A mean over `old` channels grows by the factor `old / new` if the channels that go are 0. What is
computed of it grows by a power of this factor: its reciprocal root by the power -1/2, and so what
is multiplied with that. Where a weight is multiplied, the weight can be divided by the same power.
The eps that is added to a mean must grow with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from parasparse.shrink.by_tensor import ByTensor
from parasparse.shrink.epsilons import Epsilon
from parasparse.shrink.expressions import Attribute
from parasparse.shrink.sizes import numbers

# Operations that leave values as they are, and those that take a power of them.
_ALIKE = ("_to_copy", "view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "clone", "detach",
          "alias")  # fmt: skip
# RMSNorms as one operation: see `Means.norm`.
RMS_NORMS = ("_fused_rms_norm", "rms_norm")
_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0}


@dataclass(eq=False)
class Mean:
    """A mean over channels.

    Attributes:
        label: the ids of what it is taken of.
        state: the states of what it is taken of.
        module: name of the module that takes it.
        epsilons: what is added to it, or to a power of it: attribute, value and that power.
        gains: the parameters that are multiplied with a power of it: name, what has been added to
            the parameter, and that power.
        is_read: whether something reads a result that no parameter can make up for.
    """

    label: Tensor
    state: Tensor
    module: str
    epsilons: list[tuple[Attribute, float, float]] = field(default_factory=list)
    gains: list[tuple[str, float, float]] = field(default_factory=list)
    is_read: bool = False


@dataclass(frozen=True)
class _Scaled:
    """What a tensor grows with: a power of the growth of a mean; None: it is not a power."""

    mean: Mean
    power: float | None


@dataclass(frozen=True)
class _Gain:
    """A parameter, by name, to which a number has been added."""

    name: str
    shift: float


class Means:
    """The means over channels of a run.

    Args:
        names: of the parameters and buffers, by id.

    Attributes:
        found: the means, in order.
        read: names of the parameters that something reads other than such a product.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.found: list[Mean] = []
        self.read: set[str] = set()
        self._names = names
        self._scaled: ByTensor[_Scaled] = ByTensor()
        self._gains: ByTensor[_Gain] = ByTensor()
        self._given: list[Epsilon] = []

    def start(self, label: Tensor, state: Tensor, module: str, out: Tensor, *, of: str) -> None:
        """Follow `out`, the result of an operation such as "mean", taken over `label`."""
        mean = Mean(label, state, module)
        self.found.append(mean)
        if out in self._scaled:  # over two kinds of channels at once
            mean.is_read = self._scaled[out].mean.is_read = True
        self._scaled[out] = _Scaled(mean, 1.0 if of == "mean" else None)

    def norm(
        self, label: Tensor, state: Tensor, module: str, weight: Any, epsilon: float | None
    ) -> None:
        """Add an RMSNorm that is one operation."""
        mean = Mean(label, state, module)
        self.found.append(mean)
        gain = self._gain(weight) if isinstance(weight, Tensor) else None
        if gain is None or epsilon is None or not self._adds_epsilon(mean, epsilon, 1.0):
            mean.is_read = True
        else:
            mean.gains.append((gain.name, gain.shift, -0.5))

    def give(self, values: list[Any]) -> None:
        """Tell which arguments the program passes to a function of torch; [] at its end."""
        if self._given:
            numbers.get().extend(epsilon.attribute for epsilon in self._given)
        self._given = [value for value in values if type(value) is Epsilon]

    def use(self, tensor: Tensor) -> None:
        """Remember that something reads `tensor` in a way that is not followed."""
        if tensor in self._scaled:
            self._scaled[tensor].mean.is_read = True
        gain = self._gain(tensor)
        if gain is not None:
            self.read.add(gain.name)

    def follow(self, call: Any, *, mutates: bool) -> None:
        """Follow an operation that has run. `call` is a `Call` of the trace."""
        tensors, outs = call.tensors(), call.outs()
        if call.name in RMS_NORMS:
            return
        scaled = [self._scaled[t] for t in tensors if t in self._scaled]
        if not scaled and not any(self._gain(t) for t in tensors):
            return
        name = call.name.removesuffix("_") if mutates else call.name
        in_place = mutates and name != call.name and tensors[0] in self._scaled
        after: _Scaled | _Gain | None = None
        if len(outs) == 1 and outs[0].is_floating_point() and (in_place or not mutates):
            if not scaled:
                after = self._gain_after(name, call)
            elif len(scaled) == 1:
                after = self._scaled_after(name, call, scaled[0])
        if after is None:
            for tensor in tensors:
                self.use(tensor)
        elif isinstance(after, _Gain):
            self._gains[outs[0]] = after
        else:
            self._set(outs[0], after, mutates=mutates)

    def _gain(self, tensor: Tensor) -> _Gain | None:
        name = self._names.get(id(tensor))
        return self._gains.get(tensor) if name is None else _Gain(name, 0.0)

    def _gain_after(self, name: str, call: Any) -> _Gain | None:
        first, number = call.args[0], _number(call)
        gain = self._gain(first) if isinstance(first, Tensor) else None
        if gain is not None and name in _ALIKE:
            return gain
        if gain is not None and name == "add" and number is not None:
            return _Gain(gain.name, gain.shift + number)
        return None

    def _scaled_after(self, name: str, call: Any, scaled: _Scaled) -> _Scaled | None:
        first, number = call.args[0], _number(call)
        mean, power = scaled.mean, scaled.power
        is_first = isinstance(first, Tensor) and first in self._scaled
        if power is None:
            return None
        if name in _ALIKE:
            return scaled
        if name in _POWERS:
            return _Scaled(mean, power * _POWERS[name])
        if name == "pow" and is_first and number is not None:
            return _Scaled(mean, power * number)
        if name == "add" and is_first and number is not None:
            return scaled if self._adds_epsilon(mean, number, power) else None
        others = [t for t in call.tensors() if t not in self._scaled]
        gain = self._gain(others[0]) if others else None
        if name == "mul" and gain is not None:
            mean.gains.append((gain.name, gain.shift, power))
            return _Scaled(mean, 0.0)
        if name == "addcmul" and not is_first and not call.kwargs:
            factors = [self._gain(t) for t in call.args[1:] if t not in self._scaled]
            if len(factors) == 1 and factors[0] is not None:
                mean.gains.append((factors[0].name, factors[0].shift, power))
                return _Scaled(mean, 0.0)
        if name in ("mul", "div") and gain is None and not call.kwargs:
            return _Scaled(mean, power if is_first or name == "mul" else -power)
        return None

    def _adds_epsilon(self, mean: Mean, number: float, power: float) -> bool:
        """Whether `number`, which is added, is 0 or an attribute that can change."""
        for epsilon in self._given:
            if abs(number - float(epsilon)) <= 1e-6 * float(epsilon):  # rounded to float32
                self._given = [each for each in self._given if each is not epsilon]
                mean.epsilons.append((epsilon.attribute, float(epsilon), power))
                return True
        return number == 0

    def _set(self, out: Tensor, after: _Scaled, *, mutates: bool) -> None:
        self._scaled[out] = after
        if after.power == 0:
            del self._scaled[out]
        if mutates:  # other views of the same memory grow otherwise now
            memory = out.untyped_storage()._cdata
            for tensor, scaled in self._scaled.items():
                if tensor is not out and tensor.untyped_storage()._cdata == memory:
                    scaled.mean.is_read = True


def _number(call: Any) -> float | None:
    """Return the second argument if it is a number, and there are no other ones."""
    alone = len(call.args) == 2 and not call.kwargs
    return float(call.args[1]) if alone and isinstance(call.args[1], (int, float)) else None
