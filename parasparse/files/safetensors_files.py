"""Checkpoints in safetensors files: one, or the shards of a Hugging Face folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.safetensors_heads import DTYPES, opened, torch_shape

INDEX = ".safetensors.index.json"


class SafetensorsFile(Checkpoint):
    """One .safetensors file."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._reopen()
        self.metadata = self._file.metadata() or {}
        for name in self._file.offset_keys():
            part = self._file.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f'"{path}" holds "{name}" as {part.get_dtype()}, which this torch does not '
                    "have. Upgrade torch, or convert it."
                )
            self.infos[name] = TensorInfo(dtype, torch_shape(part.get_dtype(), part.get_shape()))

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _reopen(self) -> None:
        try:
            with open(self.path, "rb"):  # raises the system's own error
                pass
            self._file: Any = opened(self.path)
        except OSError as error:
            raise CheckpointError(f'"{self.path}" cannot be read: {error.strerror}.') from error
        except ImportError as error:
            raise CheckpointError(str(error)) from error
        except Exception as error:  # safetensors' own class is not public
            raise CheckpointError(
                f'"{self.path}" is not an intact safetensors file: {error}. It was cut off, or is '
                "another kind of file."
            ) from error


class SafetensorsFolder(Checkpoint):
    """A folder with an index and its shards, or with one .safetensors file."""

    def __init__(self, path: str) -> None:
        super().__init__(os.path.dirname(path) or "." if path.endswith(INDEX) else path)
        folder = Path(self.path)
        found = [Path(path)] if path.endswith(INDEX) else sorted(folder.glob(f"*{INDEX}"))
        self.index: tuple[str, dict[str, Any]] | None = None  # its name and content
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f'"{path}" holds several indexes: {names}. Name one of them.')
        if found:
            self.index = (found[0].name, _index(found[0]))
            files = list(dict.fromkeys(self.index[1]["weight_map"].values()))
        else:
            files = [file.name for file in sorted(folder.glob("*.safetensors"))]
            if len(files) != 1:
                raise CheckpointError(
                    f'"{path}" must hold a *{INDEX}, or exactly one .safetensors file; it holds '
                    f"{len(files)}."
                )
        self.shards = {name: SafetensorsFile(os.fspath(folder / name)) for name in files}
        one, *others = (shard.metadata for shard in self.shards.values())
        self.metadata = {k: v for k, v in one.items() if all(m.get(k) == v for m in others)}
        self._of = {name: file for file, shard in self.shards.items() for name in shard.infos}
        if self.index is not None:
            self._check(self.index[1]["weight_map"])
            self._of = dict(self.index[1]["weight_map"])
        self.infos = {name: self.shards[file].infos[name] for name, file in self._of.items()}

    def _check(self, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.shards[file].infos:
                raise CheckpointError(
                    f'"{self.path}": the index says that "{name}" is in {file}, but it is not.'
                )
        rest = [name for name in self._of if name not in weight_map]
        if rest:
            raise CheckpointError(f'"{self.path}": "{rest[0]}" is in a shard, not in the index.')

    def shard_of(self, name: str) -> str:
        """Return the file that holds tensor `name`."""
        return str(self._of[name])

    def _read(self, name: str) -> Tensor:
        return self.shards[self._of[name]]._read(name)

    def _reopen(self) -> None:
        for shard in self.shards.values():
            shard._reopen()


def _index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text())
        weight_map = index["weight_map"]
        if not all(isinstance(name, str) for pair in weight_map.items() for name in pair):
            raise TypeError("names are strings")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f'"{file}" is not a safetensors index: {error!r}.') from error
    for name in weight_map.values():
        if Path(name).name != name:
            raise CheckpointError(f'"{file}" must name files beside it; it names "{name}".')
        if not (file.parent / name).is_file():
            raise CheckpointError(f'"{file}" names "{name}", which does not exist.')
    assert isinstance(index, dict)
    return index


def is_folder(path: str) -> bool:
    """Whether `path` is a folder, or the index of one."""
    return os.path.isdir(path) or path.endswith(INDEX)
