"""The command `shrink`."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from parasparse.cli.held_masks import computed
from parasparse.cli.output import copy, left_out, output
from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.layout import Layout, pieces
from parasparse.files.opening import open_checkpoint
from parasparse.files.writing import check_target
from parasparse.names import is_mask_key
from parasparse.shrink.parts import rescaled, selected
from parasparse.shrink.plan import Shrinkage, ShrinkRow
from parasparse.text import nearest


def shrink(args: Namespace) -> str:
    """Write IN with its tensors and masks cut by a plan."""
    plan = _plan(args.plan)
    source = open_checkpoint(args.input, args.key)
    check_target(args.output, source, force=args.force)
    rows = _rows(source, plan)
    infos = {
        key: TensorInfo(info.dtype, rows[key].new_shape) if key in rows else info
        for key, info in source.infos.items()
    }
    with output(args, source, Layout(infos, source.ties)) as (put, advance):
        for key, info in source.infos.items():
            if key in source.ties:
                continue
            if key in rows:
                put(key, pieces(rescaled(selected(source.read(key), rows[key]), rows[key])))
                advance(info.nbytes)
            else:
                copy(source, key, put, advance)
    after = sum(info.nbytes for key, info in infos.items() if key not in source.ties)
    return (
        f"{args.output}: cut {len(rows)} tensors, {source.nbytes:,} bytes -> {after:,}."
        f"{left_out(source, args.output)}"
    )


def _plan(path: str) -> Shrinkage:
    try:
        return Shrinkage.from_json(Path(path).read_text())
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read: {error.strerror}.') from error
    except ValueError as error:
        raise CheckpointError(
            f'"{path}" must be a plan, as written by `Shrinkage.to_json`; {error}'
        ) from error


def _rows(source: Checkpoint, plan: Shrinkage) -> dict[str, ShrinkRow]:
    """Return the row of each key that is cut: tensors, their masks, and what is tied to them."""
    keys = {source.plain(name): found for name, found in computed(source).items()}
    for key in source.infos:
        keys.setdefault(source.plain(key), [key])
    first = {}
    for row in plan.rows:
        if row.name not in keys:
            raise CheckpointError(
                f'the plan names the tensor "{row.name}", which "{source.path}" does not have'
                f"{nearest(row.name, keys)}."
            )
        for key in keys[row.name]:
            shape = source.infos[key].shape
            if shape != row.shape:
                raise CheckpointError(
                    f'"{key}" must have the shape {row.shape} of the plan; it has {shape}.'
                )
            is_mask = len(keys[row.name]) > 1 and is_mask_key(key)
            first[source.ties.get(key, key)] = replace(row, scale=1.0) if is_mask else row
    names = ((key, source.ties.get(key, key)) for key in source.infos)
    return {key: first[origin] for key, origin in names if origin in first}
