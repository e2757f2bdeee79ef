"""Weights of a model on the meta device, which are in a checkpoint until they are needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.utils import swap_tensors

from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.layout import Layout, pieces
from parasparse.files.opening import open_checkpoint
from parasparse.files.replacing import replacing
from parasparse.files.safetensors_files import INDEX
from parasparse.files.writing import safetensors_writer
from parasparse.text import listed
from parasparse.verbs.squash import squash


class OnDisk:
    """A model with parameters on the meta device, and the checkpoint that has its tensors.

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
            ValueError: there is no checkpoint, or one without a tensor of the model, a parameter is
                not on the meta device, or `output` has files of another call.
        """
        self._blocks, self._output = blocks, Path(output)
        self._source = _opened(source)
        folder = Path(self._source.path)
        if self._output.resolve() == (folder if folder.is_dir() else folder.parent).resolve():
            raise ValueError(f'`output` must be another folder than `source`; got "{output}".')
        self._names = self._names_of_tensors(model)
        self._empty: dict[Tensor, Tensor] = {}  # what is in the place of each tensor that is read
        number = f"of-{len(blocks):05d}.safetensors"
        self._files = {name: f"model-{n:05d}-{number}" for n, name in enumerate(blocks, 1)}
        self._rest = f"model-00000-{number}"
        self._check_output()

    def _names_of_tensors(self, model: nn.Module) -> dict[Tensor, str]:
        """Return the name in the checkpoint of each tensor that is read from it."""
        parameters = list(model.named_parameters(remove_duplicate=False))
        real = [name for name, parameter in parameters if not parameter.is_meta]
        if real:
            raise ValueError(
                f"`model` must have its parameters on the meta device if `source` is given; not "
                f"{listed(real)}. Leave `source` and `output` out to prune it in memory."
            )
        buffers, saved = list(model.named_buffers(remove_duplicate=False)), model.state_dict()
        named = [*parameters, *((n, b) for n, b in buffers if b.is_meta or n in saved)]
        infos = self._source.infos
        found = {tensor: name for name, tensor in named if name in infos}
        missing = [name for name, tensor in named if tensor.is_meta and tensor not in found]
        if missing:
            others = [name for name in infos if name not in dict(named)]
            raise ValueError(_lacking(self._source.path, missing, others))
        for tensor, name in found.items():
            wanted = TensorInfo(tensor.dtype, tuple(tensor.shape))
            if infos[name] != wanted:
                raise ValueError(
                    f'"{name}" must have the dtype and shape of the model, {wanted.dtype} '
                    f"{wanted.shape}; the checkpoint has {infos[name].dtype} {infos[name].shape}."
                )
        return found

    def _check_output(self) -> None:
        """Raise ValueError if `output` has other weights than an earlier call has written."""
        files = [file.name for file in self._output.glob("*.safetensors")]
        others = [name for name in files if name not in (self._rest, *self._files.values())]
        for block, file in self._files.items():
            expected = {name: self._source.infos[name] for name in self._held(block)}
            if file in files and _opened(self._output / file).infos != expected:
                others.append(file)
        if others:
            raise ValueError(
                f'`output` must be new, or of a call with the same `source` and `blocks`; "'
                f'{self._output}" has {listed(others)}.'
            )

    def is_written(self, block: str) -> bool:
        """Whether an earlier call has pruned and written the block."""
        return self._path(block).exists()

    def load(self, tensors: Iterable[Tensor]) -> None:
        """Read those of `tensors` that the checkpoint has; they stay the same objects."""
        for tensor in tensors:
            name = self._names.get(tensor)
            if name is not None and tensor not in self._empty:
                self._empty[tensor] = _swapped(tensor, self._read(name))

    def unload(self, tensors: Iterable[Tensor]) -> None:
        """Make those of `tensors` that `load` has read what they were before."""
        for tensor in tensors:
            if tensor in self._empty:
                swap_tensors(tensor, self._empty.pop(tensor))

    def write(self, name: str) -> None:
        """Fold the masks of a block, and write what the checkpoint has of it."""
        block = squash(self._blocks[name])
        state = block.state_dict(prefix=f"{name}.", keep_vars=True)
        self._write(self._path(name), {n: state.get(n) for n in self._held(name)})

    def finish(self) -> None:
        """Write all other tensors, copy the other files, and write the index."""
        for block in self._blocks:
            if not self.is_written(block):  # the model does not call it
                self._write(self._path(block), dict.fromkeys(self._held(block)))
        homes = {n: file for block, file in self._files.items() for n in self._held(block)}
        rest = [name for name in self._source.infos if name not in homes]
        self._write(self._output / self._rest, dict.fromkeys(rest))
        homes |= dict.fromkeys(rest, self._rest)
        if Path(self._source.path).is_dir():
            for file in Path(self._source.path).iterdir():
                if file.is_file() and not file.name.endswith((".safetensors", INDEX)):
                    shutil.copy2(file, self._output / file.name)
        total = sum(self._source.infos[name].nbytes for name in homes)
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        with replacing(self._output / f"model{INDEX}") as written:
            written.write(json.dumps(index, indent=2).encode())

    def _path(self, block: str) -> Path:
        return self._output / self._files[block]

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
        self._output.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write = safetensors_writer(file, Layout(infos), {"format": "pt"})
            for name, tensor in tensors.items():
                found = self._source.read(name) if tensor is None else tensor.detach().cpu()
                write(name, pieces(found))


def _opened(path: str | os.PathLike[str]) -> Checkpoint:
    try:
        return open_checkpoint(os.fspath(path))
    except CheckpointError as error:
        raise ValueError(
            f"`source`, and files in `output`, must be checkpoints: {error}"
        ) from error


def _lacking(path: str, missing: list[str], others: list[str]) -> str:
    """Return what to say of a checkpoint without tensors that a model has, but with others."""
    way_out = (
        "Tie tensors that share values, as `model.tie_weights()` does; make buffers that are not "
        "saved outside the meta device, as `accelerate.init_empty_weights()` does."
    )
    if others:
        way_out = (
            f"It has {listed(others)}, which the model has not. Use the class of model that names "
            "tensors as the checkpoint does. If transformers renames or fuses them as it loads "
            'them, such as experts, load the model once with `device_map={"": "disk"}` and write '
            "`source` by `save_pretrained(folder, save_original_format=False)`."
        )
    return f'"{path}" must hold what is on the meta device; it has no {listed(missing)}. {way_out}'


def _swapped(tensor: Tensor, other: Tensor) -> Tensor:
    """Put the content of `other` into `tensor`; return a tensor with the content before."""
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, requires_grad=tensor.requires_grad)
    swap_tensors(tensor, other)
    return other
