"""Opens checkpoints of every kind."""

import os

import torch
from torch import Tensor

from parasparse.files import packed_files
from parasparse.files.bitmask_files import BitmaskCheckpoint, layers_with_bitmasks
from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.headers import FORMAT, damage_named, is_safetensors
from parasparse.files.safetensors_files import SafetensorsFile, SafetensorsFolder, is_folder
from parasparse.files.state_dicts import NothingToChooseError, nothing_to_choose
from parasparse.files.streams import Entry, dtype_of
from parasparse.files.torch_files import TorchFile, content_of


class PackedFile(Checkpoint):
    """A file of `parasparse.save`. Reading a tensor unpacks it.

    Tensors that were coded together, with at most 2^20 entries in all, are unpacked together. Each
    is kept until it is read, or until the file is opened again.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._reopen()
        self.modules, self.metadata = self._header["modules"], self._header.get("metadata") or {}
        for name, entry in self._header["entries"].items():
            with damage_named(path, f'has no intact "{name}"'):
                self._list(name, entry)

    def _list(self, name: str, entry: Entry) -> None:
        if "same" in entry:
            self.ties[name] = entry["same"]
            self.infos[name] = self.infos[entry["same"]]
        elif "value" in entry:
            self.not_tensors[name] = entry["value"]
        else:
            shape = tuple(torch.Size(entry["shape"]))
            self.infos[name] = TensorInfo(dtype_of(entry), shape)

    def _read(self, name: str) -> Tensor:
        return self._unpacked(self.ties.get(name, name))

    def _reopen(self) -> None:
        try:
            self._header, self._unpacked = packed_files.opened(self.path)
        except (ValueError, ImportError, OSError) as error:
            raise CheckpointError(str(error)) from error


def open_checkpoint(path: str, key: str | None = None) -> Checkpoint:
    """Return the checkpoint at `path`; `key` chooses among the state dicts of a torch file.

    Raises:
        CheckpointError: no checkpoint can be read there, or `key` is needed or unknown.
        ValueError: it has bitmasks of compressed-tensors, and is damaged or quantized; or a packed
            file lists an impossible tensor.
    """
    if not os.path.exists(path):
        raise CheckpointError(f'"{path}" does not exist.')
    checkpoint = _opened(path, key)
    if key is not None and not isinstance(checkpoint, TorchFile):
        raise NothingToChooseError(nothing_to_choose(path))
    return checkpoint


def _opened(path: str, key: str | None) -> Checkpoint:
    if is_folder(path) or is_safetensors(path):
        plain = SafetensorsFolder(path) if is_folder(path) else SafetensorsFile(path)
        if plain.metadata.get("format") == FORMAT and not is_folder(path):
            return PackedFile(path)
        return BitmaskCheckpoint(plain) if layers_with_bitmasks(plain.infos) else plain
    content = content_of(path)
    is_packed = isinstance(content, dict) and content.get("format") == FORMAT
    return PackedFile(path) if is_packed else TorchFile(path, content, key)
