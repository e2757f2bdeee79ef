"""Checkpoints of compressed-tensors in its formats `sparse-bitmask` and `sparse-24-bitmask`.

They hold `layer.weight` in parts, and all other tensors as they are:

    layer.compressed   the kept values, row by row; in 2:4, a matrix of half as many columns
    layer.bitmask      uint8, a bit per entry, from the lowest bit up; each row starts a new byte
    layer.shape        int64, the sizes of the weight; in 2:4, as a column
    layer.row_offsets  int64, the values before each row, counted along the first dim; not in 2:4
"""

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from parasparse.files.bits import unpack_bits
from parasparse.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from parasparse.files.headers import FilePath, is_safetensors
from parasparse.files.safetensors_files import SafetensorsFile, SafetensorsFolder, is_folder

_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class BitmaskCheckpoint(Checkpoint):
    """The dense tensors of a checkpoint with bitmasks.

    Raises:
        ValueError: the parts of a weight do not fit each other, or its values are quantized.
    """

    def __init__(self, source: SafetensorsFile | SafetensorsFolder) -> None:
        super().__init__(source.path, metadata=source.metadata)
        self.source = source
        self.origin: dict[str, str] = {}  # name -> name in `source`; of a weight, of its values
        layers = layers_with_bitmasks(source.infos)
        for key, info in source.infos.items():
            layer, _, part = key.rpartition(".")
            if layer not in layers or part not in _PARTS:
                self.infos[key], self.origin[key] = info, key
            elif part == "compressed":
                name = f"{layer}.weight"
                self.infos[name], self.origin[name] = self._info(layer), key

    def _info(self, layer: str) -> TensorInfo:
        """Return dtype and shape of a weight; of its parts, only `shape` is read."""
        held = self.source.infos
        values, bits = held[f"{layer}.compressed"], held[f"{layer}.bitmask"]
        if values.dtype not in _DTYPES:
            raise ValueError(
                f'"{self.path}" must hold values that are not quantized; those of "{layer}.weight" '
                f"are {values.dtype}. Use the checkpoint as it was before quantization."
            )
        if f"{layer}.weight" in held:
            raise self._damaged(layer, "it is there twice, with a bitmask and without")
        shape = held.get(f"{layer}.shape")
        if shape is None or (shape.dtype, shape.numel) != (torch.int64, len(bits.shape)):
            raise self._damaged(layer, f"`shape` must be {len(bits.shape)} sizes in int64")
        sizes = self.source.read(f"{layer}.shape").flatten().tolist()
        rows, last = tuple(sizes[:-1]), sizes[-1:]
        packed = TensorInfo(torch.uint8, (*rows, *(-(-size // 8) for size in last)))
        if not sizes or min(sizes) < 0 or bits != packed:
            raise self._damaged(layer, f"`bitmask` must fit `shape`, {sizes}; got {bits}")
        offsets = held.get(f"{layer}.row_offsets", TensorInfo(torch.int64, rows))
        if offsets != TensorInfo(torch.int64, rows):
            raise self._damaged(layer, f"`row_offsets` must fit `shape`, {sizes}; got {offsets}")
        return TensorInfo(values.dtype, tuple(sizes))

    def _read(self, name: str) -> Tensor:
        if self.origin[name] == name:
            return self.source.read(name)
        layer, info = name.removesuffix(".weight"), self.infos[name]
        bits = self.source.read(f"{layer}.bitmask")
        kept = unpack_bits(bits.flatten(), 8 * bits.numel())
        kept = kept.view(*bits.shape[:-1], 8 * bits.shape[-1])[..., : info.shape[-1]]
        counts = kept.sum(-1)
        values = self.source.read(f"{layer}.compressed").flatten()
        if values.numel() != counts.sum():
            why = f"`compressed` must have {int(counts.sum())} values, as `bitmask` says"
            raise self._damaged(layer, f"{why}; got {values.numel()}")
        offsets, before = f"{layer}.row_offsets", counts.cumsum(0) - counts
        if offsets in self.source.infos and not torch.equal(self.source.read(offsets), before):
            raise self._damaged(layer, "`row_offsets` must count the bits of `bitmask`")
        return values.new_zeros(info.shape).masked_scatter_(kept, values)

    def _reopen(self) -> None:
        self.source._reopen()

    def _damaged(self, layer: str, why: str) -> ValueError:
        return ValueError(f'"{self.path}" has no intact "{layer}.weight": {why}.')


def layers_with_bitmasks(keys: Collection[str]) -> set[str]:
    """Return the layers whose weight is stored with a bitmask."""
    layers = {key.removesuffix(".bitmask") for key in keys if key.endswith(".bitmask")}
    return {layer for layer in layers if f"{layer}.compressed" in keys}


def bitmask_checkpoint(path: FilePath) -> BitmaskCheckpoint | None:
    """Return the checkpoint at `path`, or None if it has no bitmasks or is no safetensors file."""
    place = os.fspath(path)
    try:
        if is_folder(place):
            source: SafetensorsFile | SafetensorsFolder = SafetensorsFolder(place)
        elif is_safetensors(place):
            source = SafetensorsFile(place)
        else:
            return None
    except CheckpointError:
        return None
    return BitmaskCheckpoint(source) if layers_with_bitmasks(source.infos) else None


def dense_configuration(folder: str) -> dict[str, str]:
    """Return config.json of a folder without the format of its weights, as {"config.json": text}.

    With it, transformers loads the dense weights as those of any model.
    """
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(config, dict):
        return {}
    for key in ("quantization_config", "compression_config"):
        held = config.get(key)
        if isinstance(held, dict) and held.pop("sparsity_config", None) is not None:
            if not any(held.get(other) for other in ("config_groups", "transform_config")):
                del config[key]
            return {file.name: json.dumps(config, indent=2) + "\n"}
    return {}
