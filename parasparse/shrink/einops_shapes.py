"""Shapes that einops computes, and keeps for the next tensor of the same shape."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def computed_shapes() -> Iterator[None]:
    """Have einops, if it is loaded, compute shapes anew at each call, from sizes of this run.

    Otherwise it gives out those of another layer or run, which cannot follow, so that heads stay
    (test_heads_of_einops_go).
    """
    module: Any = sys.modules.get("einops.einops")
    cached = getattr(module, "_reconstruct_from_shape", None)
    plain = getattr(cached, "__wrapped__", None)  # of `functools.lru_cache`
    if plain is None:
        yield
        return
    module._reconstruct_from_shape = plain
    try:
        yield
    finally:
        module._reconstruct_from_shape = cached
