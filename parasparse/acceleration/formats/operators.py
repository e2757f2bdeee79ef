"""A product with a compressed format as a custom operator: torch.compile has no sparse tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parasparse.acceleration.formats.compiled import Compiled
from parasparse.acceleration.formats.compressed import BSR, CSR, Bag
from parasparse.acceleration.formats.format import Format

_KINDS = {"csr": CSR, "bag": Bag, "bsr": BSR, "compiled": Compiled}


def made_of(parts: Sequence[Tensor], kind: str, shape: Sequence[int]) -> CSR | Bag | BSR:
    """Return the format whose `tensors()`, `kind` and `shape` are given."""
    of: Callable[..., CSR | Bag | BSR] = _KINDS[kind]
    return of(*parts, tuple(shape))


@torch.library.custom_op("parasparse::rows", mutates_args=())
def _rows(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, shape: Sequence[int]
) -> Tensor:
    made: Tensor = made_of(parts, kind, shape).rows(x, bias)
    return made


@_rows.register_fake
def _(
    x: Tensor, bias: Tensor | None, parts: Sequence[Tensor], kind: str, shape: Sequence[int]
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


def rows(chosen: Format, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return chosen.rows(x, bias), under torch.compile as one operator.

    See test_an_accelerated_model_compiles_in_one_graph.
    """
    if torch.compiler.is_compiling() and isinstance(chosen, (CSR, Bag, BSR)):
        made: Tensor = _rows(x, bias, chosen.tensors(), chosen.kind, chosen.shape)
        return made
    return chosen.rows(x, bias)
