"""What tensors and their masks are called."""

from __future__ import annotations

PAIR_ENDINGS = (("_re", "_im"), ("_real", "_imag"))


def ancestors(name: str) -> list[str]:
    """Return `name` and the names of the modules around it: a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
