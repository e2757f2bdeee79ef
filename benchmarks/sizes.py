"""How large is the checkpoint of a sparse network, and how long does it take to write?

    python -m benchmarks.sizes

ResNet-18 with the same magnitude masks in all files, but in the dense one. Peers keep the dense
weight and a float mask while masked; once folded, theirs is the file of the dense network, as is
ours. torch.ao.pruning keeps its masks in the state of the sparsifier, which is saved beside the
model's; its sparsifiers make none for convolutions, so these are given. Times are to the page cache
of a temporary folder; gzip's are those of Python's gzip, level 6, and of torch.save before it.
"""

from __future__ import annotations

import copy
import gzip
import io
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.ao.pruning import FakeSparsity
from torch.nn.utils import parametrize, prune
from torchvision.models import resnet18

import parasparse as ps
from benchmarks.timing import compare, show, write

Sizes = dict[str, int]
State = dict[str, Any]


def zipped(state: State, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue(), 6))


def writers(sparsity: float, folder: Path) -> dict[str, tuple[Callable[[], object], Path]]:
    """Return what writes each file, and the file."""
    torch.manual_seed(0)
    dense = resnet18(weights=None)
    masked = ps.sparsify(copy.deepcopy(dense), sparsity)
    pruned, fake = copy.deepcopy(dense), copy.deepcopy(dense)
    float_masks = {name: {"mask": mask.float()} for name, mask in ps.named_masks(masked)}
    for name, mask in ps.named_masks(masked):
        place = name.rpartition(".")[0]
        prune.custom_from_mask(pruned.get_submodule(place), "weight", mask)
        parametrize.register_parametrization(
            fake.get_submodule(place), "weight", FakeSparsity(float_masks[name]["mask"])
        )
    squashed = ps.squash(copy.deepcopy(masked)).state_dict()
    written: dict[str, State] = {
        "dense": dense.state_dict(),
        "torch.nn.utils.prune": pruned.state_dict(),
        "torch.ao.pruning": {"model": fake.state_dict(), "sparsifier": {"state": float_masks}},
        "parasparse, masked": masked.state_dict(),
        "parasparse, squashed": squashed,
    }
    found: dict[str, tuple[Callable[[], object], Path]] = {}
    for name, state in written.items():
        path = folder / f"{len(found)}.pt"
        found[name] = partial(torch.save, state, path), path
    for suffix in (".pt", ".safetensors"):
        path = folder / f"packed{suffix}"
        found[f"parasparse, packed {suffix}"] = partial(ps.save, squashed, path), path
    path = folder / "squashed.pt.gz"
    found["gzip -6, squashed"] = partial(zipped, squashed, path), path
    return found


def main() -> None:
    results = {}
    sizes: dict[str, Sizes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in (0.8, 0.9, 0.95, 0.98):
            made = writers(sparsity, Path(folder))
            question = f"{sparsity:.0%}"
            calls = {name: call for name, (call, _) in made.items()}
            results[question] = compare(calls, repeats=5, warm_up=1)
            sizes[question] = {name: path.stat().st_size for name, (_, path) in made.items()}
            show(question, results[question])
            print("  bytes:", sizes[question])
    versions = {"safetensors": metadata.version("safetensors")}
    write("sizes", results, bytes=sizes, versions=versions)


if __name__ == "__main__":
    main()
