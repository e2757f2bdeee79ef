"""Weights of a model on the meta device, which are in a checkpoint until they are needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.layout import Layout
from parasparse.files.opening import open_checkpoint
from parasparse.files.replacing import replacing
from parasparse.files.safetensors_files import INDEX
from parasparse.files.writing import safetensors_writer
from parasparse.text import listed
from parasparse.verbs.squash import squash

_REST = "rest"


class OnDisk:
    """The tensors of a model that are on the meta device, and the checkpoint that has them.

    Blocks are written to files of their own, as soon as they are pruned. The index comes last.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
    ) -> None:
        """Plan what is read and written.

        Raises:
            ValueError: there is no checkpoint, or one without a tensor of the model.
        """
        self._blocks, self._output = blocks, Path(output)
        try:
            self._source: Checkpoint = open_checkpoint(os.fspath(source))
        except CheckpointError as error:
            raise ValueError(f"`source` must be a checkpoint: {error}") from error
        if self._output.resolve() == Path(self._source.path).resolve():
            raise ValueError(f'`output` must be another folder than `source`; got "{output}".')
        self._names = self._names_of_tensors(model)
        self._written = {name: number for number, name in enumerate(blocks, 1)}

    def _names_of_tensors(self, model: nn.Module) -> dict[Tensor, str]:
        """Return the name in the checkpoint of each tensor that is on the meta device."""
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        infos = self._source.infos
        found = {tensor: name for name, tensor in named if tensor.is_meta and name in infos}
        missing = [name for name, tensor in named if tensor.is_meta and tensor not in found]
        if missing:
            raise ValueError(
                f'"{self._source.path}" must hold what is on the meta device; it has no '
                f"{listed(missing)}. Make the model with parameters alone on the meta device, as "
                "`accelerate.init_empty_weights()` does, if this is a buffer that is not saved."
            )
        for tensor, name in found.items():
            wanted = TensorInfo(tensor.dtype, tuple(tensor.shape))
            if infos[name] != wanted:
                raise ValueError(
                    f'"{name}" must have the dtype and shape of the model, {wanted.dtype} '
                    f"{wanted.shape}; the checkpoint has {infos[name].dtype} {infos[name].shape}."
                )
        return found

    def is_written(self, block: str) -> bool:
        """Whether an earlier call has pruned and written the block."""
        return self._path(block).exists()

    def load(self, tensors: Iterable[Tensor]) -> None:
        """Read those of `tensors` that are on the meta device; they stay the same objects."""
        for tensor in tensors:
            name = self._names.get(tensor)
            if name is not None and tensor.is_meta:
                _swap(tensor, self._read(name))

    def unload(self, tensors: Iterable[Tensor]) -> None:
        """Put those of `tensors` that `load` has read back on the meta device."""
        for tensor in tensors:
            if tensor in self._names and not tensor.is_meta:
                _swap(tensor, torch.empty_like(tensor, device="meta"))

    def write(self, name: str) -> None:
        """Fold the masks of a block, and write what the checkpoint has of it."""
        block = squash(self._blocks[name])
        state = block.state_dict(prefix=f"{name}.", keep_vars=True)
        self._write(self._path(name), {n: state.get(n) for n in self._held(name)})

    def finish(self) -> None:
        """Write all other tensors, copy the other files, and write the index."""
        homes = {n: self._path(block).name for block in self._blocks for n in self._held(block)}
        rest = [name for name in self._source.infos if name not in homes]
        self._write(self._path(_REST), dict.fromkeys(rest))
        homes |= dict.fromkeys(rest, self._path(_REST).name)
        if Path(self._source.path).is_dir():
            for file in Path(self._source.path).iterdir():
                if file.is_file() and not file.name.endswith((".safetensors", INDEX)):
                    shutil.copy2(file, self._output / file.name)
        total = sum(self._source.infos[name].nbytes for name in homes)
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        with replacing(self._output / f"model{INDEX}") as written:
            written.write(json.dumps(index, indent=2).encode())

    def _path(self, block: str) -> Path:
        number = self._written.get(block, 0)
        return self._output / f"model-{number:05d}-of-{len(self._blocks):05d}.safetensors"

    def _held(self, block: str) -> list[str]:
        return [name for name in self._source.infos if name.startswith(f"{block}.")]

    def _read(self, name: str) -> Tensor:
        for block in self._blocks:
            if name.startswith(f"{block}.") and self.is_written(block):
                return open_checkpoint(os.fspath(self._path(block))).read(name).clone()
        return self._source.read(name).clone()

    def _write(self, path: Path, tensors: Mapping[str, Tensor | None]) -> None:
        """Write `tensors`; those that are None are as in the source."""
        infos = {name: self._source.infos[name] for name in tensors}
        self._output.mkdir(exist_ok=True)
        with replacing(path) as file:
            write = safetensors_writer(file, Layout(infos), {"format": "pt"})
            for name, tensor in tensors.items():
                found = self._source.read(name) if tensor is None else tensor.detach().cpu()
                write(name, [found])


def _swap(tensor: Tensor, other: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, requires_grad=tensor.requires_grad)
    swap_tensors(tensor, other)
