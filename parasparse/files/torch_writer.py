"""Torch files written tensor by tensor, without holding them in memory."""

from __future__ import annotations

import copy
import mmap
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parasparse.files.checkpoint import Checkpoint
from parasparse.files.layout import Layout, Put, pieces
from parasparse.files.nested import renewed, tensors_in
from parasparse.files.replacing import replacing_path, reserve
from parasparse.files.state_dicts import Place, at
from parasparse.files.torch_files import TorchFile
from parasparse.names import ancestors


@contextmanager
def torch_writer(path: str, source: Checkpoint, layout: Layout) -> Iterator[Put]:
    """Yield a function that takes each tensor of a torch file at `path`; see `writing`."""
    whole = source if isinstance(source, TorchFile) and layout.is_whole else None
    place = () if whole is None else whole.place
    made = _content(source, layout, whole)
    with replacing_path(path) as beside:
        writer = _TorchWriter(os.fspath(beside), made)
        del made

        def write(name: str, pieces: Iterable[Tensor]) -> None:
            writer.put(lambda content: at(content, place)[name], pieces)

        yield write
        if whole is not None:
            _copy_rest(whole, writer)
        writer.close()


def _content(source: Checkpoint, layout: Layout, whole: TorchFile | None) -> Any:
    """Return the content of the new file, with unfilled tensors that share no memory."""
    state: OrderedDict[Any, Any] = OrderedDict()
    for name, info in layout.infos.items():
        first = layout.ties.get(name)
        state[name] = torch.empty(info.shape, dtype=info.dtype) if first is None else state[first]
    if not layout.is_whole:
        return state
    made: dict[tuple[Any, ...], Tensor] = {}
    state.update({key: renewed(value, made) for key, value in source.not_tensors.items()})
    state._metadata = _modules_of(source, layout)  # type: ignore[attr-defined]
    return state if whole is None else _around(state, whole.content, whole.place, made)


def _around(state: Any, content: Any, place: Place, made: dict[tuple[Any, ...], Tensor]) -> Any:
    """Return `content` with unfilled tensors, and `state` at `place`."""
    if not place:
        return state
    new = copy.copy(content)
    for key, value in content.items():
        own = key == place[0]
        new[key] = _around(state, value, place[1:], made) if own else renewed(value, made)
    return new


def _modules_of(source: Checkpoint, layout: Layout) -> OrderedDict[str, Any]:
    """Return the versions of the modules, without parametrizations that are gone."""
    modules = source.modules or {}
    stays = {place for name in layout.infos for place in ancestors(name)}
    return OrderedDict(
        (k, v) for k, v in modules.items() if "parametrizations" not in k.split(".") or k in stays
    )


def _copy_rest(source: TorchFile, writer: _TorchWriter) -> None:
    """Copy the tensors outside the state dict, such as the optimizer's."""
    for number in range(len(tensors_in(source.rest()))):
        writer.put(
            lambda content, n=number: tensors_in(source.rest(content))[n],  # type: ignore[misc]
            pieces(source.tensor_of_rest(number)),
        )


class _TorchWriter:
    """Writes a torch file whose tensors come one by one, in any order.

    `torch.save` writes the file with empty storages. These are mapped and filled, and the checksums
    of the archive are set at the end. Where maps cannot be shared, the content stays in memory.
    """

    def __init__(self, path: str, content: Any) -> None:
        self._path, self._unflushed, self._maps = path, 0, hasattr(mmap, "MAP_SHARED")
        self._content: Any = None
        nbytes = sum({id(tensor): tensor.nbytes for tensor in tensors_in(content)}.values())
        # Writing to a map on a full disk would kill the process instead of raising.
        with open(path, "r+b") as file:
            reserve(file, nbytes)
        with torch.serialization.skip_data():
            torch.save(content, path)
        with open(path, "r+b") as file:
            reserve(file, os.path.getsize(path))
        self._reopen()

    @torch.no_grad()
    def put(self, place: Callable[[Any], Tensor], pieces: Iterable[Tensor]) -> None:
        """Fill the tensor that `place` returns of the content with flat pieces in order."""
        nbytes = place(self._content).nbytes
        if self._maps and self._unflushed and self._unflushed + nbytes > 1 << 26:
            self._reopen()
        self._unflushed += nbytes
        tensor = place(self._content)
        if not tensor.is_contiguous():
            tensor.copy_(torch.cat(list(pieces)).view(tensor.shape))
            return
        flat, start = tensor.view(-1), 0
        for piece in pieces:
            flat[start : start + piece.numel()] = piece
            start += piece.numel()

    def close(self) -> None:
        """Finish the file."""
        if self._maps:
            self._content = None
            _set_checksums(self._path)
        else:
            torch.save(self._content, self._path)

    def _reopen(self) -> None:
        self._content = None  # releases the old map first
        self._unflushed = 0
        if not self._maps:
            self._content = torch.load(self._path, weights_only=True)
            return
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            self._content = torch.load(self._path, mmap=True, weights_only=True)


def _set_checksums(path: str) -> None:
    """Write the CRC-32 of each record of a zip archive: beside its data, and in the directory.

    Reference: PKWARE, ".ZIP File Format Specification", 4.3.7, 4.3.9 and 4.3.12.
    """
    with zipfile.ZipFile(path) as archive:
        records, start = archive.infolist(), archive.start_dir
    with open(path, "r+b") as file:
        entry = start
        for record in records:
            file.seek(record.header_offset)
            local = file.read(30)
            name, extra = struct.unpack("<HH", local[26:30])
            begin = record.header_offset + 30 + name + extra
            file.seek(begin)
            crc, left = 0, record.file_size
            while left:
                chunk = file.read(min(left, 1 << 22))
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            packed = struct.pack("<I", crc)
            file.seek(entry)
            directory = file.read(46)
            file.seek(entry + 16)
            file.write(packed)
            entry += 46 + sum(struct.unpack("<HHH", directory[28:34]))
            if record.flag_bits & 8:  # after the data, behind a signature
                file.seek(begin + record.file_size)
                behind = 4 if file.read(4) == b"PK\x07\x08" else 0
                file.seek(begin + record.file_size + behind)
            else:
                file.seek(record.header_offset + 14)
            file.write(packed)
        file.flush()
        os.fsync(file.fileno())
