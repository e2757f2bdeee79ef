"""The commands that only read: `inspect` and `diff`."""

import json
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from parasparse.cli.output import others
from parasparse.cli.progress import progress
from parasparse.dtypes import signed
from parasparse.files.checkpoint import Checkpoint, CheckpointError
from parasparse.files.opening import open_checkpoint
from parasparse.files.state_dicts import NothingToChooseError
from parasparse.patterns.recognise import recognised
from parasparse.report.plot_bars import sparsity_bars
from parasparse.text import as_text, needs

_PIECE = 1 << 20  # entries


@dataclass(frozen=True)
class Row:
    """One tensor in the table of `inspect`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int
    patterns: tuple[str, ...]  # that the zeros of a weight follow, such as "2:4"
    nbytes: int  # 0 for a tied tensor
    same: str | None  # the first name of a tied tensor


def inspect(args: Namespace) -> tuple[str, int]:
    """Return a table of the tensors of a checkpoint, and the exit code."""
    source = open_checkpoint(args.input, args.key)
    rows = list(_rows(source))
    if args.plot and os.path.lexists(args.plot):
        raise CheckpointError(f'"{args.plot}" exists already. Name another file.')
    if args.plot:
        _plot(rows, args.plot)
    numel = sum(row.numel for row in rows if row.same is None)
    zeros = sum(row.zeros for row in rows if row.same is None)
    nbytes = sum(row.nbytes for row in rows)
    if args.json:
        sums = {"tensors": len(rows), "numel": numel, "zeros": zeros, "nbytes": nbytes}
        content = {
            "path": args.input, "metadata": source.metadata,
            "tensors": [asdict(row) for row in rows], "total": sums,
        }  # fmt: skip
        return json.dumps(content, indent=2), 0
    cells = [
        (row.name, _shape(row.shape), row.dtype, f"{row.zeros:,}", _share(row.zeros, row.numel),
         ", ".join(row.patterns), f"{row.nbytes:,}" if row.same is None else f"is {row.same}")
        for row in rows
    ]  # fmt: skip
    total = ("", "", f"{zeros:,}", _share(zeros, numel), "", f"{nbytes:,}")
    cells.append((f"{len(rows)} tensors", *total))
    head = ("tensor", "shape", "dtype", "zeros", "sparsity", "pattern", "bytes")
    return f"{as_text(head, cells)}\n{others(source).strip()}".rstrip(), 0


def _rows(source: Checkpoint) -> Iterator[Row]:
    first: dict[str, Row] = {}
    with progress("inspect", source.nbytes) as advance:
        for name, info in source.infos.items():
            dtype = str(info.dtype).removeprefix("torch.")
            if name in source.ties:
                row = first[source.ties[name]]
                yield Row(name, info.shape, dtype, row.numel, row.zeros, row.patterns, 0, row.name)
                continue
            kept = _nonzero(source.read(name))
            zeros = info.numel - int(kept.count_nonzero())
            is_weight = info.dtype.is_floating_point or info.dtype.is_complex
            patterns = recognised(kept) if zeros and len(info.shape) > 1 and is_weight else []
            own = (info.numel, zeros, tuple(patterns), info.nbytes, None)
            first[name] = Row(name, info.shape, dtype, *own)
            advance(info.nbytes)
            yield first[name]


def diff(args: Namespace) -> tuple[str, int]:
    """Return the differences between two checkpoints, and the exit code: 0 if there are none."""
    one, two = _both(args)
    named = [{source.plain(name): name for name in source.infos} for source in (one, two)]
    lines = [f"only in {args.one}: {named[0][name]}" for name in named[0] if name not in named[1]]
    lines += [f"only in {args.two}: {named[1][name]}" for name in named[1] if name not in named[0]]
    same = 0
    with progress("diff", one.nbytes) as advance:
        for name in [name for name in named[0] if name in named[1]]:
            info = one.infos[named[0][name]]
            line = _difference(one, named[0][name], two, named[1][name])
            lines += [line] if line else []
            same += not line
            advance(info.nbytes)
    rest = {*one.beside_state_dict, *two.beside_state_dict}
    rest |= set(map(str, {**one.not_tensors, **two.not_tensors}))
    note = f" Not compared: {', '.join(sorted(rest))}." if rest else ""
    if not lines:
        return f"{same} tensors are the same; nothing differs.{note}", 0
    lines.append(f"{same} tensors are the same; see the {len(lines)} differences above.{note}")
    return "\n".join(lines), 1


def _both(args: Namespace) -> list[Checkpoint]:
    """Open A and B; `--key` may be for one of them only, if the other is a single state dict."""
    found, refused = [], []
    for path in (args.one, args.two):
        try:
            found.append(open_checkpoint(path, args.key))
        except NothingToChooseError as error:
            refused.append(error)
            found.append(open_checkpoint(path))
    if len(refused) == len(found):
        raise refused[0]
    return found


def _difference(one: Checkpoint, name: str, two: Checkpoint, other_name: str) -> str:
    infos = one.infos[name], two.infos[other_name]
    if infos[0] != infos[1]:
        texts = [f"{str(i.dtype).removeprefix('torch.')} {_shape(i.shape)}" for i in infos]
        return f"{name}: {texts[0]} and {texts[1]}"
    different, by, zeros = 0, 0.0, [0, 0]
    flat = (one.read(name).flatten(), two.read(other_name).flatten())
    for a, b in zip(*(tensor.split(_PIECE) for tensor in flat), strict=True):
        other = _differ(a, b)
        number = int(other.count_nonzero())
        if number:
            off = (_wide(a)[other] - _wide(b)[other]).abs().nan_to_num(nan=math.inf).max()
            by = max(by, float(off))
        different += number
        zeros = [n + int((~_nonzero(t)).sum()) for n, t in zip(zeros, (a, b), strict=True)]
    if not different:
        return ""
    return (
        f"{name}: {different:,} of {infos[0].numel:,} entries differ, by {by:.3g} at most; zeros "
        f"{zeros[0]:,} and {zeros[1]:,}"
    )


def _differ(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or a.is_complex():
        a, b = _wide(a), _wide(b)
        return (a != b) & ~(a.isnan() & b.isnan())
    return signed(a) != signed(b)


def _nonzero(tensor: Tensor) -> Tensor:
    return signed(tensor) != 0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _share(zeros: int, numel: int) -> str:
    return f"{zeros / numel:.2%}" if numel else ""


def _plot(rows: list[Row], path: str) -> None:
    """Draw the sparsity of each weight into a picture."""
    weights = [row for row in rows if len(row.shape) > 1 and row.numel]
    counts = {row.name: (row.numel - row.zeros, row.numel) for row in weights}
    try:
        figure = sparsity_bars(counts, "weight entries")
    except ImportError as error:
        raise CheckpointError(needs("--plot", "matplotlib", "plot")) from error
    figure.savefig(path, dpi=120)
