"""Checkpoints written tensor by tensor, in any order, that appear when they are complete."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from parasparse.files.bits import buffer
from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.layout import Layout, Put
from parasparse.files.replacing import replacing, replacing_folder, reserve
from parasparse.files.safetensors_files import SafetensorsFolder
from parasparse.files.safetensors_heads import head
from parasparse.files.torch_writer import torch_writer

TORCH = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (".safetensors", *TORCH)


def check_target(path: str, source: Checkpoint, *, force: bool) -> None:
    """Raise CheckpointError if `source` cannot become a checkpoint at `path`."""
    if isinstance(source, SafetensorsFolder) and Path(path).suffix.lower() not in _SUFFIXES:
        check_folder(path, source.path, force=force)
    else:
        check_file(path, force=force)


def check_folder(path: str, source: str, *, force: bool) -> None:
    """Raise CheckpointError if the folder `source` cannot become another one at `path`."""
    _check_free(path, force)
    if Path(source).resolve() in Path(path).resolve().parents:
        raise CheckpointError(f'"{path}" must not be inside IN, whose files are all copied.')
    if os.path.exists(path):
        _check_replaceable(path, source)


def check_file(path: str, *, force: bool) -> None:
    """Raise CheckpointError if no file can be written to `path`."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f'"{path}" must end in one of {", ".join(_SUFFIXES)}.')
    _check_free(path, force)
    if os.path.isdir(path):
        raise CheckpointError(f'"{path}" must be a file; it is a folder.')


def _check_replaceable(path: str, source: str) -> None:
    """Raise CheckpointError if `path` is anything but an empty folder or a checkpoint."""
    if not os.path.isdir(path):
        raise CheckpointError(f'"{path}" must be a folder; it is a file.')
    held, inner = Path(path).resolve(), Path(source).resolve()
    if held in (*inner.parents, *Path.cwd().parents, Path.cwd()):
        raise CheckpointError(
            f'"{path}" is replaced, so it must not hold IN or the current working directory.'
        )
    try:
        if any(held.iterdir()):
            SafetensorsFolder(path)
    except CheckpointError as error:
        raise CheckpointError(
            f'"{path}" is replaced as a whole, so it must be a checkpoint: {error}'
        ) from error


def _check_free(path: str, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise CheckpointError(f'"{path}" exists already. Use --force to replace it.')
    parent = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(parent):
        raise CheckpointError(f'"{path}" cannot be written: the folder "{parent}" does not exist.')


@contextmanager
def writing(path: str, source: Checkpoint, layout: Layout) -> Iterator[Put]:
    """Yield a function that takes each tensor of `layout` once; the checkpoint appears at the end.

    Raises:
        CheckpointError: a safetensors file cannot hold an entry of `source`.
        RuntimeError: a tensor was not put, or its dtype or size is not that of `layout`.
    """
    missing = {name for name in layout.infos if name not in layout.ties}
    suffix = Path(path).suffix.lower()
    with ExitStack() as stack:
        if suffix == ".safetensors":
            if layout.is_whole and source.not_tensors:
                raise CheckpointError(
                    f'safetensors files hold only tensors; "{source.path}" also holds '
                    f'"{next(iter(source.not_tensors))}". Write a .pt file.'
                )
            file = stack.enter_context(replacing(path))
            write = safetensors_writer(file, layout, source.metadata)
        elif suffix in TORCH:
            write = stack.enter_context(torch_writer(path, source, layout))
        else:
            assert isinstance(source, SafetensorsFolder)
            write = stack.enter_context(_folder_writer(path, source, layout))

        def put(name: str, pieces: Iterable[Tensor]) -> None:
            if name not in missing:
                raise RuntimeError(f"{name!r} was put twice, or is not in the layout.")
            missing.remove(name)
            write(name, _checked(name, layout.infos[name], pieces))

        yield put
        if missing:
            raise RuntimeError(f"{sorted(missing)} were not put.")


def _checked(name: str, info: TensorInfo, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield `pieces`; raise RuntimeError if they do not fit `info`."""
    numel = 0
    for piece in pieces:
        numel += piece.numel()
        if piece.dtype != info.dtype or numel > info.numel:
            break
        yield piece
    if numel != info.numel:
        raise RuntimeError(f"the dtype or size of {name!r} is not that of the layout.")


def safetensors_writer(file: BinaryIO, layout: Layout, metadata: Mapping[str, str]) -> Put:
    """Return a function that writes each tensor of `layout` to its place in a file."""
    start = head(metadata, {n: (info.dtype, info.shape) for n, info in layout.infos.items()})
    file.write(start)
    offsets, end = {}, len(start)
    for name, info in layout.infos.items():
        offsets[name], end = end, end + info.nbytes
    reserve(file, end)  # so a full disk raises before the work is done
    ties: dict[str, list[str]] = {}
    for name, first in layout.ties.items():
        ties.setdefault(first, []).append(name)

    def write(name: str, pieces: Iterable[Tensor]) -> None:
        done = 0
        for piece in pieces:
            data = piece.contiguous().view(torch.uint8)
            for each in (name, *ties.get(name, ())):
                file.seek(offsets[each] + done)
                file.write(buffer(data))
            done += data.numel()

    return write


@contextmanager
def _folder_writer(path: str, source: SafetensorsFolder, layout: Layout) -> Iterator[Put]:
    homes = {n: source.shard_of(layout.origin.get(n, n)) for n in layout.infos}
    with replacing_folder(path) as folder, ExitStack() as files:
        writers: dict[str, Put] = {}
        for shard, held in source.shards.items():
            infos = {n: layout.infos[n] for n, home in homes.items() if home == shard}
            file = files.enter_context(open(folder / shard, "xb"))
            writers[shard] = safetensors_writer(file, Layout(infos), held.metadata)
        _copy_files(source, folder, homes, layout)
        yield lambda name, pieces: writers[homes[name]](name, pieces)


def _copy_files(
    source: SafetensorsFolder, folder: Path, homes: Mapping[str, str], layout: Layout
) -> None:
    """Write the index, and copy the other files: configurations, vocabularies."""
    if source.index is not None:
        name, index = source.index
        size = sum(info.nbytes for info in layout.infos.values())
        metadata = {**(index.get("metadata") or {}), "total_size": size}
        text = json.dumps({**index, "metadata": metadata, "weight_map": dict(homes)}, indent=2)
        (folder / name).write_text(text + "\n")
    for name, text in layout.texts.items():
        (folder / name).write_text(text)
    made = {file.name for file in folder.iterdir()}
    shutil.copymode(source.path, folder)
    for shard in source.shards:
        shutil.copymode(Path(source.path) / shard, folder / shard)
    for file in sorted(Path(source.path).iterdir()):
        if file.name in made:
            continue
        if file.is_symlink() and not file.is_file():  # to a folder, or to nothing
            os.symlink(os.path.realpath(file), folder / file.name)
        elif file.is_dir():
            shutil.copytree(file, folder / file.name, symlinks=True)
        elif file.is_file():
            shutil.copy2(file, folder / file.name)
