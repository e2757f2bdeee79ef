"""Checkpoints in torch files, read and written without holding them in memory."""

from __future__ import annotations

import mmap
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from parasparse.cli.checkpoint import Checkpoint, CheckpointError, info_of
from parasparse.cli.contents import check_dense, identity, tensors_in
from parasparse.sparse._replacing import reserve

_STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")


class TorchFile(Checkpoint):
    """A file of torch.save that holds a state dict, alone or under one of its usual keys.

    Attributes:
        content: all that the file holds; its tensors are mapped.
        key: where the state dict is in it; None: it is the content itself.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._reopen()
        self.key = _state_key(self.content, path)
        self.modules = getattr(self.state(), "_metadata", None)
        first: dict[tuple[Any, ...], str] = {}
        for name, value in self.state().items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                self.others[name] = value
                continue
            check_dense(value, f'"{name}" of "{path}"')
            self.infos[name] = info_of(value)
            known = first.setdefault(identity(value), name)
            if known != name:
                self.same[name] = known
        if self.key is not None:
            self.around = [str(key) for key in self.content if key != self.key]

    def state(self) -> Mapping[str, Any]:
        """Return the state dict, its tensors mapped."""
        state: Mapping[str, Any] = self.content if self.key is None else self.content[self.key]
        return state

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self.state()[name]
        return tensor.detach()

    def rest(self, content: Any = None) -> Any:
        """Return what is not among `infos`: around the state dict, and in it.

        Args:
            content: of a file that is laid out as this one; None: this one.
        """
        content = self.content if content is None else content
        state = content if self.key is None else content[self.key]
        around = {} if self.key is None else {k: v for k, v in content.items() if k != self.key}
        return around, {key: state[key] for key in self.others}

    def tensor_of_rest(self, number: int) -> Tensor:
        """Return one of the tensors in `rest()`."""
        self._mapped(tensors_in(self.rest())[number].nbytes)
        return tensors_in(self.rest())[number].detach()

    def _reopen(self) -> None:
        self.content = _loaded(self.path)


def _loaded(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():  # of what is refused later
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read: {error.strerror}.') from error
    except Exception as error:  # over damaged bytes torch raises all kinds
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise CheckpointError(
                f'"{path}" holds more than tensors and plain values; code in it was not run. Save '
                "its `state_dict()` alone."
            ) from error
        raise CheckpointError(
            f'"{path}" is no whole checkpoint of torch.save: it was cut off, or is another kind '
            "of file."
        ) from error


def _state_key(content: Any, path: str) -> str | None:
    if isinstance(content, Mapping):
        if any(isinstance(v, Tensor) and "." in str(name) for name, v in content.items()):
            return None
        for key in _STATE_KEYS:  # first: there may be a tensor beside it, such as the best accuracy
            held = content.get(key)
            if isinstance(held, Mapping) and any(isinstance(v, Tensor) for v in held.values()):
                return key
        if any(isinstance(value, Tensor) for value in content.values()):
            return None
    raise CheckpointError(
        f'"{path}" must hold a state dict, alone or as one of {", ".join(_STATE_KEYS)}; it holds '
        f"{type(content).__name__}. Save the state dict alone."
    )


class TorchWriter:
    """Writes a torch file whose tensors come one by one, in any order.

    `torch.save` writes the file with empty storages; these are mapped and filled, and the checksums
    of the archive are set at the end. Where maps cannot be shared, all is held in memory instead.

    Args:
        path: to be made.
        content: what the file is to hold; only the dtypes, shapes and ties of its tensors count.
    """

    def __init__(self, path: str, content: Any) -> None:
        self._path, self._unflushed, self._maps = path, 0, hasattr(mmap, "MAP_SHARED")
        self._content: Any = None
        # A full disk must raise, not kill the process that writes to the map.
        with open(path, "r+b") as file:
            reserve(file, _nbytes(content))
        with torch.serialization.skip_data():
            torch.save(content, path)
        with open(path, "r+b") as file:
            reserve(file, os.path.getsize(path))
        self._reopen()

    @torch.no_grad()
    def put(self, place: Callable[[Any], Tensor], pieces: Iterable[Tensor]) -> None:
        """Give the tensor at `place` of the content its values, flat pieces of them in turn."""
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
        if not self._maps:
            torch.save(self._content, self._path)
            return
        self._content = None
        _set_checksums(self._path)

    def _reopen(self) -> None:
        self._content = None  # lets go of the old map first
        self._unflushed = 0
        if not self._maps:
            self._content = torch.load(self._path, weights_only=True)
            return
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            self._content = torch.load(self._path, mmap=True, weights_only=True)


def _nbytes(content: Any) -> int:
    """Return the bytes of all different tensors of `content`."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors_in(content)}.values())


def _set_checksums(path: str) -> None:
    """Write the CRC-32 of each record where a zip archive has it: before it, and in the directory.

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
