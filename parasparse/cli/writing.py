"""Checkpoints that are written tensor by tensor, in any order, and appear when they are whole."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from parasparse._apply_mask import apply_mask
from parasparse.cli.checkpoint import Checkpoint, CheckpointError, Info
from parasparse.cli.contents import renewed, tensors_in
from parasparse.cli.safetensors_files import SafetensorsFolder, tensor_bytes
from parasparse.cli.torch_files import TorchFile, TorchWriter
from parasparse.sparse._replacing import replacing, replacing_folder, replacing_path, reserve
from parasparse.sparse._safetensors import head
from parasparse.sparse.files import buffer

_PIECE = 1 << 20  # entries
TORCH = (".pt", ".pth", ".bin", ".ckpt")
# Takes a tensor by name, as flat pieces, the first entries first.
Put = Callable[[str, Iterable[Tensor]], None]


@dataclass(frozen=True)
class Layout:
    """What a new checkpoint holds.

    Attributes:
        infos: of each tensor, in order.
        same: a name that is the same tensor as another one -> that one, which is put for both.
        origin: a name that the source has not -> the one of the source that it comes from.
        is_whole: what else the source holds (an optimizer, an index, a configuration) comes along.
    """

    infos: dict[str, Info]
    same: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True


_SUFFIXES = (".safetensors", *TORCH)


def check_target(path: str, source: Checkpoint, *, force: bool) -> None:
    """Raise CheckpointError if `source` cannot become a checkpoint at `path`."""
    if isinstance(source, SafetensorsFolder) and Path(path).suffix.lower() not in _SUFFIXES:
        _check_free(path, force)
        if Path(source.path).resolve() in Path(path).resolve().parents:
            raise CheckpointError(f'"{path}" must not lie in IN, of which all files are copied.')
        if os.path.exists(path):
            _check_replaceable(path, source.path)
    else:
        check_file(path, force=force)


def check_file(path: str, *, force: bool) -> None:
    """Raise CheckpointError if no file can be written to `path`."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f'"{path}" must end in one of {", ".join(_SUFFIXES)}.')
    _check_free(path, force)
    if os.path.isdir(path):
        raise CheckpointError(f'"{path}" must be a file or be free; it is a folder.')


def _check_replaceable(path: str, source: str) -> None:
    """Raise CheckpointError if a folder would be lost that is more than a checkpoint."""
    if not os.path.isdir(path):
        raise CheckpointError(f'"{path}" must be a folder or be free; it is a file.')
    held, inner = Path(path).resolve(), Path(source).resolve()
    if held in (*inner.parents, *Path.cwd().parents, Path.cwd()):
        raise CheckpointError(f'"{path}" must not hold IN or be where you are: it is replaced.')
    try:
        if any(held.iterdir()):
            SafetensorsFolder(path)
    except CheckpointError as error:
        raise CheckpointError(
            f'"{path}" must be a folder of a checkpoint, which is replaced as a whole: {error}'
        ) from error


def _check_free(path: str, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise CheckpointError(f'"{path}" is there already. Use --force to replace it.')
    parent = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(parent):
        raise CheckpointError(f'"{path}" cannot be written: there is no folder "{parent}".')


@contextmanager
def writing(path: str, source: Checkpoint, layout: Layout) -> Iterator[Put]:
    """Yield a function that takes each tensor of `layout` once; the checkpoint appears at the end.

    Raises:
        RuntimeError: a tensor was not put, or had another dtype or shape.
    """
    missing = {name for name in layout.infos if name not in layout.same}
    suffix = Path(path).suffix.lower()
    with ExitStack() as stack:
        if suffix == ".safetensors":
            if layout.is_whole and source.others:
                raise CheckpointError(
                    f'safetensors files hold tensors by name alone; "{source.path}" holds '
                    f'"{next(iter(source.others))}". Write a .pt file.'
                )
            file = stack.enter_context(replacing(path))
            write = _safetensors_writer(file, layout, source.metadata)
        elif suffix in TORCH:
            write = stack.enter_context(_torch_writer(path, source, layout))
        else:
            assert isinstance(source, SafetensorsFolder)
            write = stack.enter_context(_folder_writer(path, source, layout))

        def put(name: str, pieces: Iterable[Tensor]) -> None:
            if name not in missing:
                raise RuntimeError(f"{name!r} was put twice, or never announced.")
            missing.remove(name)
            write(name, _checked(name, layout.infos[name], pieces))

        yield put
        if missing:
            raise RuntimeError(f"{sorted(missing)} were not put.")


def pieces(tensor: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the entries of `tensor`, masked, in flat pieces: no second tensor of its size."""
    if tensor.dim() == 0 or tensor.numel() <= _PIECE:
        yield (tensor if mask is None else apply_mask(tensor, mask)).flatten()
        return
    for start, piece in enumerate(tensor.flatten().split(_PIECE)):
        part = None if mask is None else mask.flatten()[start * _PIECE :][: len(piece)]
        yield piece if part is None else apply_mask(piece, part)


def _checked(name: str, info: Info, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield `pieces`; raise RuntimeError if they are not the tensor that was announced."""
    numel = 0
    for piece in pieces:
        numel += piece.numel()
        if piece.dtype != info.dtype or numel > info.numel:
            break
        yield piece
    if numel != info.numel:
        raise RuntimeError(f"{name!r} is not as it was announced.")


def _safetensors_writer(file: BinaryIO, layout: Layout, metadata: Mapping[str, str]) -> Put:
    start = head(metadata, {n: (info.dtype, info.shape) for n, info in layout.infos.items()})
    file.write(start)
    offsets, end = {}, len(start)
    for name, info in layout.infos.items():
        offsets[name], end = end, end + info.nbytes
    reserve(file, end)  # a full disk is known before the work is done
    ties = _ties(layout)

    def write(name: str, pieces: Iterable[Tensor]) -> None:
        done = 0
        for piece in pieces:
            data = tensor_bytes(piece)
            for each in (name, *ties.get(name, ())):
                file.seek(offsets[each] + done)
                file.write(buffer(data))
            done += data.numel()

    return write


@contextmanager
def _torch_writer(path: str, source: Checkpoint, layout: Layout) -> Iterator[Put]:
    whole = source if isinstance(source, TorchFile) and layout.is_whole else None
    key = None if whole is None else whole.key
    made = _content(source, layout, whole)
    with replacing_path(path) as beside:
        writer = TorchWriter(os.fspath(beside), made)
        del made

        def write(name: str, pieces: Iterable[Tensor]) -> None:
            writer.put(lambda content: (content if key is None else content[key])[name], pieces)

        yield write
        if whole is not None:
            _copy_rest(whole, writer)
        writer.close()


def _content(source: Checkpoint, layout: Layout, whole: TorchFile | None) -> Any:
    """Return what the new torch file holds, with tensors of any values, which share no memory."""
    state: OrderedDict[Any, Any] = OrderedDict()
    for name, info in layout.infos.items():
        first = layout.same.get(name)
        state[name] = torch.empty(info.shape, dtype=info.dtype) if first is None else state[first]
    if not layout.is_whole:
        return state
    made: dict[tuple[Any, ...], Tensor] = {}
    state.update({key: renewed(value, made) for key, value in source.others.items()})
    state._metadata = _dense_modules(source)  # type: ignore[attr-defined]
    if whole is None or whole.key is None:
        return state
    content = copy.copy(whole.content)
    for key, value in whole.content.items():
        content[key] = state if key == whole.key else renewed(value, made)
    return content


def _dense_modules(source: Checkpoint) -> OrderedDict[str, Any]:
    """Return the versions of modules, without those of parametrizations."""
    modules = source.modules or {}
    return OrderedDict((k, v) for k, v in modules.items() if "parametrizations" not in k.split("."))


def _copy_rest(source: TorchFile, writer: TorchWriter) -> None:
    """Copy the tensors that are not in the state dict: an optimizer's, say."""
    for number in range(len(tensors_in(source.rest()))):
        writer.put(
            lambda content, n=number: tensors_in(source.rest(content))[n],  # type: ignore[misc]
            pieces(source.tensor_of_rest(number)),
        )


@contextmanager
def _folder_writer(path: str, source: SafetensorsFolder, layout: Layout) -> Iterator[Put]:
    homes = {n: source.shard_of(layout.origin.get(n, n)) for n in layout.infos}
    with replacing_folder(path) as folder, ExitStack() as files:
        writers: dict[str, Put] = {}
        for shard, held in source.shards.items():
            infos = {n: layout.infos[n] for n, home in homes.items() if home == shard}
            file = files.enter_context(open(folder / shard, "xb"))
            writers[shard] = _safetensors_writer(file, Layout(infos), held.metadata)
        _copy_files(source, folder, homes, layout)
        yield lambda name, pieces: writers[homes[name]](name, pieces)


def _copy_files(
    source: SafetensorsFolder, folder: Path, homes: Mapping[str, str], layout: Layout
) -> None:
    """Write the index, and copy what else lies beside the shards: configurations, vocabularies."""
    if source.index is not None:
        name, index = source.index
        size = sum(info.nbytes for info in layout.infos.values())
        metadata = {**(index.get("metadata") or {}), "total_size": size}
        text = json.dumps({**index, "metadata": metadata, "weight_map": dict(homes)}, indent=2)
        (folder / name).write_text(text + "\n")
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


def _ties(layout: Layout) -> dict[str, list[str]]:
    ties: dict[str, list[str]] = {}
    for name, first in layout.same.items():
        ties.setdefault(first, []).append(name)
    return ties
