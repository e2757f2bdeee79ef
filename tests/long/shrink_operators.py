"""Operators and modules of torch, each between a layer and a sum, which shrink must not change.

    python -m tests.long.shrink_operators [name ...]

The operators, the modules and their inputs are those with which torch tests itself. Each tensor
among the inputs in turn comes from a layer, with the channels along each of its dimensions in turn;
the others are parameters. Half of the units are masked, then half of the rows of the layer alone.
Whatever goes, the smaller network must compute the same, without the check of `shrink`. Channels
may stay.

Prints a line for each network that does not, and the totals. Exits with 1 if there is one.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import parasparse as ps
from parasparse.shrink.calls import tensors_among

Sample = tuple[Any, list[Any], dict[str, Any]]  # what to call, arguments, and those by name
SAMPLES = 12  # of an operator, at random
LARGEST = 5_000  # entries of a tensor
ROUNDING = {torch.float64: 1e-8, torch.complex128: 1e-8}  # of the others: 1e-3
LEFT_OUT = {
    "empty": "memory that nothing has written",
    "empty_like": "memory that nothing has written",
    "empty_permuted": "memory that nothing has written",
    "empty_strided": "memory that nothing has written",
    "new_empty": "memory that nothing has written",
    "new_empty_strided": "memory that nothing has written",
    "diff": "with n=0, it asks for sizes that it does not use",
    "pca_lowrank": "vectors of singular values that are 0",
    "svd_lowrank": "vectors of singular values that are 0",
}


class Between(nn.Module):
    """A layer, an operator, and a weighted sum of one of its results.

    Args:
        call: the operator.
        arguments: what it gets, in order. Tensors of numbers become parameters.
        kwargs: what it gets by name.
        place: which of the arguments comes from the layer.
        dim: along which dimension of it the channels are.
    """

    def __init__(
        self, call: Any, arguments: list[Any], kwargs: dict[str, Any], place: int, dim: int
    ) -> None:
        super().__init__()
        self.call, self.place, self.dim, self.result = call, place, dim, 0
        self.layer = nn.Linear(3, arguments[place].shape[dim], dtype=arguments[place].dtype)
        own = [n != place and _is_of_numbers(each) for n, each in enumerate(arguments)]
        self.fixed = [None if _is_of_numbers(each) else each for each in arguments]
        self.own = nn.ParameterList(
            [
                nn.Parameter(each.clone())
                for each, is_own in zip(arguments, own, strict=True)
                if is_own
            ]
        )
        self.named = nn.ParameterDict(
            {k: nn.Parameter(v.clone()) for k, v in kwargs.items() if _is_of_numbers(v)}
        )
        self.kwargs = {k: v for k, v in kwargs.items() if k not in self.named}

    def results(self, x: Tensor) -> list[Tensor]:
        own, channels = iter(self.own), self.layer(x).movedim(-1, self.dim)
        given = [
            channels if n == self.place else next(own) if each is None else each
            for n, each in enumerate(self.fixed)
        ]
        out = self.call(*given, **self.kwargs, **self.named)
        found = [each for each in tensors_among([out]) if each.numel()]
        return [each if _is_of_numbers(each) else each.double() for each in found]

    def forward(self, x: Tensor) -> Tensor:
        return (self.results(x)[self.result] * self.weight).sum()


def _is_of_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _has_channels(value: Any) -> bool:
    return _is_of_numbers(value) and value.ndim > 0 and 0 < value.numel() <= LARGEST


def operators_of(operator: Any, dtype: torch.dtype) -> list[Sample]:
    """Return the samples of an operator."""
    if not operator.supports_dtype(dtype, "cpu"):
        return []
    return [_sample(operator.op, each) for each in operator.sample_inputs("cpu", dtype)]


def _sample(call: Any, sample: Any) -> Sample:
    if not isinstance(sample.input, (list, tuple)):
        return call, [sample.input, *sample.args], sample.kwargs
    number = len(sample.input)

    def of_list(*arguments: Any, **kwargs: Any) -> Any:
        return call(list(arguments[:number]), *arguments[number:], **kwargs)

    return of_list, [*sample.input, *sample.args], sample.kwargs


def modules_of(info: Any, dtype: torch.dtype) -> list[Sample]:
    """Return the samples of a class of modules."""
    if dtype not in info.dtypes:
        return []
    found = []
    for each in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=False
    ):
        if each.forward_input is not None:
            built, given = each.constructor_input, each.forward_input
            module = info.module_cls(*built.args, **built.kwargs).to(dtype)
            found.append((module, list(given.args), given.kwargs))
    return found


def networks_of(samples: list[Sample], dtype: torch.dtype) -> Iterator[tuple[Between, Tensor]]:
    """Yield networks around an operator, with example inputs."""
    for call, arguments, kwargs in random.Random(0).sample(samples, min(SAMPLES, len(samples))):
        if any(isinstance(each, Tensor) and each.layout != torch.strided for each in arguments):
            continue  # which cannot be copied
        for place, tensor in enumerate(arguments):
            for dim in range(tensor.ndim) if _has_channels(tensor) else ():
                if tensor.shape[dim] < 2:
                    continue
                torch.manual_seed(0)
                model = Between(call, arguments, kwargs, place, dim).eval()
                shape = [n for d, n in enumerate(tensor.shape) if d != dim]
                x = torch.randn(*shape, 3, dtype=dtype)
                for number, result in enumerate(_tried(model.results, x) or ()):
                    model = copy.deepcopy(model)
                    model.result = number
                    model.weight = nn.Parameter(torch.randn(result.shape, dtype=result.dtype))
                    if _tried(model, x) is not None:
                        yield model, x


def _tried(call: Any, x: Tensor) -> Any:
    """Return what is computed, or None if it fails, as for a probability that is negative here."""
    torch.manual_seed(1)
    try:
        with torch.no_grad():
            return call(x)
    except Exception:
        return None


def law(model: Between, x: Tensor, *, filters: bool) -> str:
    """Mask a network, cut it, and say what came of it."""
    rules: Any = {"layer.weight": ps.Prune(0.5, pattern=ps.patterns.channel(0, norm=2))}
    if not filters:
        units = ps.coupled(model, x)
        if str(units).startswith("coupled(0 units"):
            return "kept"
        rules = units.rules(0.5)
    ps.sparsify(model, rules)
    if _tried(model, x) is None:  # such as a matrix that is singular without some rows
        return "masked network does not run"
    if not ps.plan_shrink(model, x).rows:
        return "kept"
    small = ps.shrink(copy.deepcopy(model), x, check=False)
    for given in (x, torch.randn_like(x)):
        want, got = (_tried(network, given) for network in (model, small))
        if want is None:
            continue
        if bool(want.isnan()):
            return "masked network gives NaN"
        most = ROUNDING.get(want.dtype, 1e-3) * max(float(want.abs()), 1e-3)
        if got is None or not (got == want or float((want - got).abs()) <= most):
            return f"differs: {want} {got}"
    return "equal"


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    totals: Counter[str] = Counter()
    failed = 0
    cases = [(operator.name, partial(operators_of, operator)) for operator in op_db]
    cases += [(info.name, partial(modules_of, info)) for info in module_db]
    for name, samples_in in cases:
        if name in LEFT_OUT or (names and name not in names):
            continue
        for dtype in (torch.float64, torch.complex128):
            for model, x in networks_of(samples_in(dtype), dtype):
                for filters in (False, True):
                    try:
                        found = law(copy.deepcopy(model), x, filters=filters)
                    except Exception as error:
                        found = f"raises: {error!r:.200}"
                    totals[found.split(":")[0]] += 1
                    if found.startswith(("differs", "raises")):
                        failed += 1
                        shapes = [tuple(each.shape) for each in model.own]
                        print(name, dtype, tuple(x.shape), model.dim, shapes, filters, found)
    print(dict(totals))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
