"""Checkpoints as the commands see them: tensors by name, each read on demand."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parasparse.names import depth_of, plain

FRESH = 1 << 26  # bytes read through one mapping of a file before it is mapped again


class CheckpointError(Exception):
    """A fault of a checkpoint or a command, and the way out, in one line."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor that has not been read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize


@dataclass(eq=False)
class Checkpoint(ABC):
    """Tensors by name in a file or folder.

    The pages of a mapped file stay in memory once read. The file is mapped again from time to time,
    so memory holds at most the tensors in use and 64 MiB.
    """

    path: str  # as the user wrote it
    infos: dict[str, TensorInfo] = field(default_factory=dict)  # in the order of the file
    ties: dict[str, str] = field(default_factory=dict)  # name -> first name of the same tensor
    metadata: dict[str, str] = field(default_factory=dict)  # of a whole safetensors file
    modules: Mapping[str, Any] | None = None  # `state_dict._metadata`: versions of the modules
    not_tensors: dict[Any, Any] = field(default_factory=dict)  # other entries of the state dict
    beside_state_dict: list[str] = field(default_factory=list)  # other entries of the file: "epoch"
    other_state_dicts: list[str] = field(default_factory=list)  # keys of those that are not read
    _read_bytes: int = 0

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, which must not be written to."""
        self._about_to_read(self.infos[name].nbytes)
        return self._read(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, tied ones once."""
        for name in self.infos:
            if name not in self.ties:
                yield name, self.read(name)

    @cached_property
    def depth(self) -> int:
        """Number of "module" before all names, as those of DDP have."""
        return depth_of(self.infos)

    def plain(self, name: str) -> str:
        """Return `name` without the prefixes of wrappers, unless another tensor has this name."""
        short = plain(name, self.depth)
        return name if short in self.infos else short

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, tied ones once."""
        return sum(info.nbytes for name, info in self.infos.items() if name not in self.ties)

    def _about_to_read(self, nbytes: int) -> None:
        if self._read_bytes and self._read_bytes + nbytes > FRESH:
            self._reopen()
            self._read_bytes = 0
        self._read_bytes += nbytes

    @abstractmethod
    def _read(self, name: str) -> Tensor: ...

    @abstractmethod
    def _reopen(self) -> None: ...
