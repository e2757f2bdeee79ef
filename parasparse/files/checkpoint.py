"""What a checkpoint is to the commands: tensors by name, each read when it is wanted."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FRESH = 1 << 26  # bytes read through one mapping of a file before it is mapped anew


class CheckpointError(Exception):
    """What is wrong with a checkpoint or a command, and the way out, in one line."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.numel * self.dtype.itemsize


def info_of(tensor: Tensor) -> TensorInfo:
    """Return what is known of `tensor`."""
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


@dataclass(eq=False)
class Checkpoint(ABC):
    """Tensors by name in a file or folder.

    A mapped file stays in memory as far as it was read, so that it is mapped anew now and then: no
    more is held than the tensors in use and 64 MiB.

    Attributes:
        path: as the user wrote it.
        infos: what is known of each tensor, in the order of the file.
        ties: a name that is the same tensor as an earlier one -> that one.
        metadata: strings that safetensors keeps for the file as a whole.
        modules: what torch keeps beside a state dict: the versions of its modules.
        not_tensors: entries of the state dict that are not tensors.
        beside_state_dict: the file's other entries, such as "optimizer" and "epoch".
    """

    path: str
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    modules: Mapping[str, Any] | None = None
    not_tensors: dict[Any, Any] = field(default_factory=dict)
    beside_state_dict: list[str] = field(default_factory=list)
    _read_bytes: int = 0

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, not to be written to."""
        self._about_to_read(self.infos[name].nbytes)
        return self._read(name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors but those that are the same as an earlier one."""
        for name in self.infos:
            if name not in self.ties:
                yield name, self.read(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all different tensors."""
        return sum(info.nbytes for name, info in self.infos.items() if name not in self.ties)

    def _about_to_read(self, nbytes: int) -> None:
        """Map the file anew if, with so many bytes more, too much of it would be in memory."""
        if self._read_bytes and self._read_bytes + nbytes > FRESH:
            self._reopen()
            self._read_bytes = 0
        self._read_bytes += nbytes

    @abstractmethod
    def _read(self, name: str) -> Tensor: ...

    @abstractmethod
    def _reopen(self) -> None: ...
