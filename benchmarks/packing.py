"""Packed state dicts: how many bytes, and how fast compared with `torch.save`?

    python -m benchmarks.packing

Sizes are ratios to the file that torch.save writes for the dense state.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import compare, show, threads, write
from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.files.packing import pack, unpack

State = dict[str, Tensor]
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
DTYPES = (torch.float32, torch.bfloat16)


def single_entries(shape: tuple[int, int], sparsity: float) -> Tensor:
    return torch.rand(shape) >= sparsity


def rows(shape: tuple[int, int], sparsity: float) -> Tensor:
    return (torch.rand(shape[0], 1) >= sparsity).expand(shape)


def blocks(shape: tuple[int, int], sparsity: float) -> Tensor:
    grid = torch.rand(shape[0] // 16, shape[1] // 16) >= sparsity
    return grid.repeat_interleave(16, 0).repeat_interleave(16, 1)


MASKS: dict[str, Callable[[tuple[int, int], float], Tensor]] = {
    "entries": single_entries,
    "rows": rows,
    "blocks of 16": blocks,
}


def state(size: int, mask: str, sparsity: float, dtype: torch.dtype) -> State:
    """Return four layers, each a square weight of `size` rows and a dense bias."""
    found: State = {}
    for i in range(4):
        kept = MASKS[mask]((size, size), sparsity)
        found[f"{i}.weight"] = torch.where(kept, torch.randn(size, size), 0.0).to(dtype)
        found[f"{i}.bias"] = torch.randn(size).to(dtype)
    return found


def check(dense: State, loaded: State) -> None:
    for name, tensor in dense.items():
        if not torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise AssertionError(f"{name} has changed")


def sizes(size: int, folder: Path) -> dict[str, float]:
    """Return the bytes of packed files as ratios to dense ones."""
    found = {}
    for mask in MASKS:
        for dtype in DTYPES:
            for sparsity in SPARSITIES:
                dense = state(size, mask, sparsity, dtype)
                torch.save(dense, folder / "dense.pt")
                for suffix in (".pt", ".safetensors"):
                    path = folder / f"packed{suffix}"
                    save(dense, path)
                    check(dense, load_packed(path))
                    ratio = path.stat().st_size / (folder / "dense.pt").stat().st_size
                    question = f"{mask}, {dtype}, {sparsity:.0%}, {suffix}"
                    found[question] = ratio
                    print(f"{question:<50}{ratio:.4f}")
    return found


def speeds(size: int, folder: Path) -> dict[str, dict]:
    """Time `pack`, `unpack` and the files against torch.save and torch.load of the dense state."""
    results = {}
    for dtype in DTYPES:
        for mask, sparsity in (*(("entries", s) for s in SPARSITIES), ("blocks of 16", 0.9)):
            dense = state(size, mask, sparsity, dtype)
            packed = pack(dense)
            check(dense, unpack(packed))
            for suffix in (".pt", ".safetensors"):
                save(dense, folder / f"packed{suffix}")
            torch_save = partial(torch.save, dense, folder / "dense.pt")
            functions = {
                "torch.save, dense": torch_save,
                "pack": partial(pack, dense),
                "unpack": partial(unpack, packed),
                "save .pt": partial(save, dense, folder / "packed.pt"),
                "save .safetensors": partial(save, dense, folder / "packed.safetensors"),
                "torch.load, dense": partial(torch.load, folder / "dense.pt"),
                "load_packed .pt": partial(load_packed, folder / "packed.pt"),
                "load_packed .safetensors": partial(load_packed, folder / "packed.safetensors"),
            }
            for number in (1, 2):
                with threads(number):
                    timings = compare(functions, repeats=5, warm_up=1)
                total = sum(tensor.nbytes for tensor in dense.values())
                question = (
                    f"{mask}, {dtype}, {sparsity:.0%}, {number} thread(s), "
                    f"{total / 1e6:.0f} MB of dense bytes"
                )
                show(question, timings)
                for name in ("torch.save, dense", "pack", "unpack"):
                    print(f"  {name:<28}{total / timings[name].median / 1e3:12.0f} MB/s")
                results[question] = timings
    return results


def main(asked: list[str]) -> None:
    size = int(asked[0]) if asked else 2048
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratios = sizes(size, folder)
        results = speeds(size, folder)
    if not asked:  # a smaller run replaces nothing
        write("packing", results, sizes=ratios)


if __name__ == "__main__":
    main(sys.argv[1:])
