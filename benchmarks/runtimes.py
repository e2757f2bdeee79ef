"""How fast are sparse networks in torch, with parasparse, and in other runtimes?

    python -m benchmarks.runtimes [TEXT ...]

Needs `pip install MNN==3.6.1 openvino onnxruntime onnx torchvision transformers`, and Python 3.11
for DeepSparse, which is installed into an environment of its own, `out/deepsparse`. A runtime that
does not install or run is left out. With TEXT, only the questions that contain each TEXT are asked,
such as `"ViT-B/16" "batch 1, 1 thread"`. Each answer is written at once; other results stay.

Random weights, unstructured zeros by magnitude in every weight that a sparsity alone reaches. Each
runtime has a process of its own and loads the same squashed network. They take turns, and the least
times of all their calls count. Processor time includes threads that wait for others in a loop.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models

import parasparse as ps
from benchmarks.networks import bert, images, tokens
from benchmarks.runtime_process import RUNTIMES
from benchmarks.timing import QUICK, threads, write

HERE = Path(__file__).parents[1]
# A function that makes the network, and one that makes inputs of a batch size.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "ResNet-50": (models.resnet50, images),
    "MobileNetV3-Large": (models.mobilenet_v3_large, images),
    "ViT-B/16": (models.vit_b_16, images),
    "BERT-base, 128 tokens": (bert, tokens),
}
SETTINGS = ((1, 1), (16, 1), (1, 2), (16, 2))  # batch and threads
SPARSITIES = (0.9,) if QUICK else (0.0, 0.8, 0.9, 0.95, 0.98)
DEEPSPARSE = "1.8.0"


def questions() -> dict[str, tuple[str, float, int, int]]:
    """Return network, sparsity, batch and threads of each question, the most important first."""
    return {
        f"{name}, {sparsity:.0%}, batch {batch}, {threads} thread(s)":
            (name, sparsity, batch, threads)
        for batch, threads in SETTINGS
        for name in NETWORKS
        for sparsity in SPARSITIES
    }  # fmt: skip


def save(name: str, sparsity: float, batch: int, folder: Path) -> None:
    """Write a squashed network and its input, for all runtimes."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    model, x = build().eval(), inputs(batch)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)  # torchvision's ViT starts with a head of 0
    if sparsity:
        ps.squash(ps.sparsify(model, sparsity))
    np.save(folder / "x.npy", x.numpy())
    torch.save(model, folder / "model.pt")
    export(model, x, folder / "model.onnx")


def export(model: nn.Module, x: Tensor, file: Path) -> None:
    """Write `model` as ONNX, in a form that DeepSparse reads too: an opset of 2021."""
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=14, **names)


def python_of(runtime: str) -> str:
    """Return the interpreter to run `runtime` with; make its environment if it needs one.

    Raises:
        CalledProcessError: it cannot be made.
    """
    if runtime != "DeepSparse":
        return sys.executable
    folder = HERE / "out" / "deepsparse"
    python = folder / "bin" / "python"
    if not list(folder.glob("lib/*/site-packages/deepsparse")):
        subprocess.run(["python3.11", "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", f"deepsparse=={DEEPSPARSE}"]
        subprocess.run(install, check=True)
    return str(python)


class Runtime:
    """A process that has loaded the network of a folder."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        arguments = ["-m", "benchmarks.runtime_process", name, str(folder), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (folder / f"{name}.log").open("w") as log:
            self.process = subprocess.Popen(
                [python_of(name), *arguments], stderr=log, cwd=HERE, **pipes
            )
        if not self.process.stdout.readline():
            self.process.wait()
            raise RuntimeError((folder / f"{name}.log").read_text()[-500:])

    def turn(self) -> tuple[float, float]:
        """Return the least processor time and wall time of some calls, in milliseconds."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        processor, wall = map(float, self.process.stdout.readline().split())
        return processor, wall


@contextmanager
def loaded(folder: Path, threads: int) -> Iterator[dict[str, Runtime]]:
    """Load the network of a folder in every runtime that can, one after the other."""
    runtimes: dict[str, Runtime] = {}
    with ExitStack() as stack:
        for name in RUNTIMES:
            try:
                runtimes[name] = Runtime(name, folder, threads)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                print(f"left out: {name}: {error}", file=sys.stderr)
            else:
                stack.callback(runtimes[name].process.wait)
                stack.callback(runtimes[name].process.stdin.close)
        yield runtimes


def differences(folder: Path, names: Iterator[str]) -> dict[str, float]:
    """Return the largest difference of each output from torch's, over the largest of these.

    Raises:
        AssertionError: it is more than rounding.
    """
    expected = np.load(folder / "torch.npy")
    largest = np.abs(expected).max() or 1.0  # with few random weights, all outputs can be 0
    found = {}
    for name in names:
        output = np.load(folder / f"{name}.npy").reshape(expected.shape)
        found[name] = float(np.abs(output - expected).max() / largest)
        assert found[name] < 1e-3, f"{name}: {found[name]}"
    return found


def answer(question: tuple[str, float, int, int], folder: Path) -> dict[str, dict[str, float]]:
    """Return processor and wall milliseconds, and the differences, of each runtime."""
    *about, number = question
    with threads(1):
        save(*about, folder)
    with loaded(folder, number) as runtimes:
        others = [name for name in runtimes if name != "torch"]
        differ = differences(folder, others)
        turns = {name: [] for name in runtimes}
        for turn in range(2 if QUICK else 5 if question[2] == 1 else 3):
            for name in list(runtimes)[:: -1 if turn % 2 else 1]:
                turns[name].append(runtimes[name].turn())
    processor, wall = (
        {name: min(times[i] for times in found) for name, found in turns.items()} for i in (0, 1)
    )
    return {"processor": processor, "wall": wall, "differences": differ}


def versions() -> dict[str, str]:
    found = {"DeepSparse": DEEPSPARSE}
    for name in ("onnxruntime", "openvino", "MNN"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(asked: list[str]) -> None:
    warnings.filterwarnings("ignore")
    for question, about in questions().items():
        if not all(text in question for text in asked):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = answer(about, Path(folder))
        print(question, flush=True)
        for name, processor in found["processor"].items():
            times = f"{processor:10.2f} ms of processor time {found['wall'][name]:10.2f} ms"
            print(f"  {name:<12}{times}", f"{found['differences'].get(name, 0):.1e}", flush=True)
        kept = {key: {question: value} for key, value in found.items()}
        write("runtimes", {}, add=True, unit="milliseconds", versions=versions(), **kept)


if __name__ == "__main__":
    main(sys.argv[1:])
