"""Saved choices of formats (plans): checked and applied."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from parasparse.acceleration.formats.format import ALL_FORMATS, FORMATS, formats_of
from parasparse.acceleration.formats.library import library
from parasparse.acceleration.table import AccelerationRow, row_of
from parasparse.text import listed

# Pairs of rows and format by name of the weight, plain JSON.
SavedChoices = Mapping[str, list[tuple[int, str | None]]]


def checked_plan(formats: Any) -> dict[str, list[tuple[int, str | None]]] | None:
    """Return `formats` as a plan; None if it is names of formats."""
    if not isinstance(formats, Mapping):
        return None
    plan: dict[str, list[tuple[int, str | None]]] = {}
    for name, every in formats.items():
        pairs = [tuple(pair) for pair in every] if _is_list(every, _is_list) else []
        good = [p for p in pairs if len(p) == 2 and type(p[0]) is int and p[0] > 0]
        if not pairs or len({p[0] for p in good}) < len(pairs):
            raise ValueError(
                "`formats`, as a plan, must hold pairs of a number of rows and a format for each "
                f'weight, such as [[1, "csr"], [64, None]]; got {every!r:.60} for {name!r}.'
            )
        plan[name] = good
    if not plan:
        raise ValueError("`formats`, as a plan, must name a weight; got an empty one.")
    return plan


def _is_list(value: Any, of: Any = None) -> bool:
    return isinstance(value, (list, tuple)) and (of is None or all(map(of, value)))


def checked_names(formats: Any, *, compile_kernel: bool = False) -> list[str]:
    """Return the formats that may be chosen, or those in a plan; raise if one is not known."""
    if formats is None:
        return _compilable(list(ALL_FORMATS if compile_kernel else FORMATS))
    if not isinstance(formats, (str, list, tuple, set, Mapping)):
        raise TypeError(
            f"`formats` must be names of formats, or a plan; got {formats!r} of type "
            f"{type(formats).__name__}."
        )
    names = [formats] if isinstance(formats, str) else list(formats)
    if compile_kernel:
        names.append("compiled")
    if isinstance(formats, Mapping):
        names = [name for every in formats.values() for _, name in every if name is not None]
    unknown = [name for name in names if not isinstance(name, str) or name not in ALL_FORMATS]
    if unknown or not (names or isinstance(formats, Mapping)):
        got = listed(unknown) or "none"
        raise ValueError(f"`formats` must be among {listed(ALL_FORMATS)}; got {got}.")
    return names if isinstance(formats, Mapping) else _compilable(names)


def _compilable(names: list[str]) -> list[str]:
    """Return `names`, without the format that needs a compiler if there is none."""
    return [name for name in names if name != "compiled" or library() is not None]


def planned(plan: SavedChoices, originals: Mapping[str, Tensor]) -> list[AccelerationRow]:
    """Return the rows of `plan`; raise ValueError if a format cannot hold its weight."""
    rows = []
    for name, original in originals.items():
        choices = [(int(n), f) for n, f in plan[name]]
        names = [f for _, f in choices if f is not None]
        missing = [f for f in names if f not in formats_of(original.detach(), names)]
        if missing:
            raise ValueError(
                f"the plan in `formats` does not fit the model: {missing[0]!r} cannot hold "
                f'"{name}" of shape {tuple(original.shape)}. Measure again, without a plan.'
            )
        rows += [row_of(name, original, n, f, None, None) for n, f in choices]
    return rows
