"""The commands that write a checkpoint, except `prune`. Each returns the line to print."""

import os
from argparse import Namespace

import torch
from torch import Tensor

from parasparse.cli import held_masks
from parasparse.cli.output import copy, left_out, others, output
from parasparse.cli.progress import progress
from parasparse.files import packed_files
from parasparse.files.bitmask_files import BitmaskCheckpoint, dense_configuration
from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.layout import Layout, pieces
from parasparse.files.opening import PackedFile, open_checkpoint
from parasparse.files.writing import check_file, check_target
from parasparse.text import listed


def squash(args: Namespace) -> str:
    """Write IN with its masks folded in, under dense names."""
    source, held = _masked(args)
    weights, masks = {one.weight: one.name for one in held}, {one.mask for one in held}
    names = {key: weights.get(key, key) for key in source.infos if key not in masks}
    _fold(args, source, held, names)
    folded = listed(one.name for one in held)
    return f"{args.output}: folded in the masks of {folded}.{left_out(source, args.output)}"


def binarize(args: Namespace) -> str:
    """Write IN with bool masks, their scale folded into the weights."""
    source, held = _masked(args)
    _fold(args, source, held, {key: key for key in source.infos})
    number = len({one.mask for one in held})
    return f"{args.output}: {number} masks are bool.{left_out(source, args.output)}"


def _fold(
    args: Namespace, source: Checkpoint, held: list[held_masks.MaskedKey], names: dict[str, str]
) -> None:
    """Write the tensors in `names` (key -> new name): weights masked, masks bool."""
    mask_of, masks = {one.weight: one.mask for one in held}, {one.mask for one in held}
    layout = Layout({}, origin={name: key for key, name in names.items()})
    first: dict[tuple[str, str], str] = {}
    for key, name in names.items():
        info, mask = source.infos[key], mask_of.get(key, "")
        layout.infos[name] = TensorInfo(torch.bool, info.shape) if key in masks else info
        tied = (source.ties.get(key, key), source.ties.get(mask, mask))  # by weight and mask
        if first.setdefault(tied, name) != name:
            layout.ties[name] = first[tied]
    with output(args, source, layout) as (put, advance):
        for key, name in names.items():
            if name in layout.ties:
                continue
            tensor = source.read(key) != 0 if key in masks else source.read(key)
            put(name, pieces(tensor, source.read(mask_of[key]) if key in mask_of else None))
            advance(source.infos[key].nbytes)


def masks(args: Namespace) -> str:
    """Write only the masks of IN, bool, under the names of the dense tensors."""
    source = open_checkpoint(args.input, args.key)
    check_file(args.output, force=args.force)
    if args.zeros:
        found = [name for name, tensor in source.tensors() if _has_zeros(tensor)]
        names = {source.plain(name): name for name in found}
        if not names:
            raise CheckpointError(f'"{args.input}" has no zeros in its weights.')
    else:
        names = held_masks.mask_names(source)
    infos = {name: TensorInfo(torch.bool, source.infos[key].shape) for name, key in names.items()}
    with output(args, source, Layout(infos, is_whole=False)) as (put, advance):
        for name, key in names.items():
            put(name, pieces(source.read(key) != 0))
            advance(source.infos[key].nbytes)
    return f"{args.output}: {len(names)} masks.{others(source)}"


def pack(args: Namespace) -> str:
    """Write IN without its zeros."""
    source = open_checkpoint(args.input, args.key)
    check_file(args.output, force=args.force)
    like = {n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in source.infos.items()}
    state = {**like, **source.not_tensors}
    try:
        packed_files.check_storable(state, state)
    except TypeError as error:
        raise CheckpointError(str(error)) from error
    header = {
        "entries": packed_files.entries_of(state, source.ties),
        "modules": source.modules,
        "metadata": source.metadata,
    }
    with progress("pack", source.nbytes) as advance:

        def read(name: str) -> Tensor:
            advance(source.infos[name].nbytes)
            return source.read(name)

        packed_files.write(args.output, read, header)
    size = os.path.getsize(args.output)
    share = f"{size / max(1, source.nbytes):.1%} of the dense tensors"
    return f"{args.output}: {size:,} bytes, {share}.{left_out(source, '')}"


def unpack(args: Namespace) -> str:
    """Write a packed checkpoint, or one with bitmasks of compressed-tensors, dense."""
    source = open_checkpoint(args.input)
    if isinstance(source, BitmaskCheckpoint):
        home: Checkpoint = source.source
        texts = dense_configuration(source.path) if os.path.isdir(source.path) else {}
        layout = Layout(source.infos, origin=source.origin, texts=texts)
    elif isinstance(source, PackedFile):
        home, layout = source, Layout(source.infos, source.ties)
    else:
        raise CheckpointError(f'"{args.input}" is not a packed file.')
    check_target(args.output, home, force=args.force)
    with output(args, home, layout) as (put, advance):
        for name in source.infos:
            if name not in source.ties:
                copy(source, name, put, advance)
    return f"{args.output}: {len(source.infos)} tensors."


def _masked(args: Namespace) -> tuple[Checkpoint, list[held_masks.MaskedKey]]:
    source = open_checkpoint(args.input, args.key)
    check_target(args.output, source, force=args.force)
    return source, held_masks.masked_keys(source)


def _has_zeros(tensor: Tensor) -> bool:
    weight = tensor.ndim > 1 and (tensor.is_floating_point() or tensor.is_complex())
    return weight and not bool((tensor != 0).all())
