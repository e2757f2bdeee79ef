"""What do zeros save in MNN?

    python -m benchmarks.mnn [TEXT ...]

Needs `pip install MNN==3.6.1 onnx onnxscript torchvision`. Each network is pruned, squashed and
exported to ONNX, then converted twice: as it is, and with `--detectSparseSpeedUp`. A third file has
the zeros in blocks of 4 x 1, for which MNN has a kernel of its own. All run in turn in one process
on one thread, and time is processor time, so other programs disturb it little. One sample, random
weights, zeros in every weight that a sparsity alone reaches. With TEXT, only the questions that
contain each TEXT are asked, such as `ResNet-50`; other results stay.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import MNN
import torch
from torch import Tensor, nn
from torchvision.models import resnet50, vit_b_16

import parasparse as ps
from benchmarks.timing import QUICK, compare, own, show, write

# The command `mnnconvert` calls pip when it starts; the module behind it does not.
CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
NETWORKS = {"ResNet-50": resnet50, "ViT-B/16": vit_b_16}
SPARSITIES = (0.8, 0.9, 0.95)


def blocks(scores: Tensor, sparsity: float) -> Tensor:
    """Prune the weights of four outputs together."""
    return ps.patterns.block((4, *[1] * (scores.dim() - 1)))(scores, sparsity)


# Of each pattern, what to convert, and with which options.
SPARSE = ["--detectSparseSpeedUp"]
FILES: dict[ps.patterns.Pattern, dict[str, list[str]]] = {
    ps.patterns.unstructured: {"dense": [], "sparse": SPARSE},
    blocks: {"sparse, blocks": SPARSE},
}


def questions() -> dict[str, tuple[str, float]]:
    every = {f"{name}, {zeros:.0%}": (name, zeros) for name in NETWORKS for zeros in SPARSITIES}
    return dict(list(every.items())[-1:]) if QUICK else every


def pruned(name: str, sparsity: float, pattern: ps.patterns.Pattern) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name](weights=None).eval()
    if name == "ViT-B/16":
        nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's starts with zeros
    return ps.squash(ps.sparsify(model, ps.Prune(sparsity, pattern=pattern)))


def converted(
    model: nn.Module, x: Tensor, files: dict[str, list[str]], folder: Path
) -> dict[str, Path]:
    """Write `model` as ONNX, and as MNN files with the options of each; return these."""
    program = folder / "model.onnx"
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(
        model, (x,), program, dynamo=True, verbose=False, external_data=False, **names
    )
    made = {}
    for name, options in files.items():
        made[name] = folder / f"{name}.mnn"
        paths = ["--modelFile", str(program), "--MNNModel", str(made[name])]
        command = [sys.executable, "-c", CONVERT, "-f", "ONNX", *paths, *options]
        subprocess.run(command, check=True, capture_output=True)
    return made


def runner(file: Path, x: Tensor) -> Callable[[], Tensor]:
    """Return a call of the network in `file` on `x`, with one thread in full precision."""
    network = MNN.nn.load_module_from_file(
        str(file), ["x"], ["y"],
        precision_mode=MNN.expr.PrecisionMode.High, thread_num=1,
    )  # fmt: skip
    given = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW)
    given.write(x.numpy())

    def call() -> Tensor:
        return torch.from_numpy(MNN.expr.convert(network.forward(given), MNN.expr.NCHW).read())

    return call


def processor_time(function: Callable[[], object]) -> float:
    """Return the milliseconds of processor time of one call."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


@torch.no_grad()
def main(asked: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    for question, (name, sparsity) in questions().items():
        if not all(text in question for text in asked):
            continue
        calls, bytes_of = {}, {}
        for pattern, files in FILES.items():
            model = pruned(name, sparsity, pattern)
            expected = model(x)
            with tempfile.TemporaryDirectory() as folder:
                for kind, file in converted(model, x, files, Path(folder)).items():
                    bytes_of[kind] = file.stat().st_size
                    call = runner(file, x)
                    torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-3)
                    calls[kind] = partial(processor_time, call)
        results = {question: compare(calls, repeats=11, clock=own)}
        dense = bytes_of.pop("dense")
        sizes = {question: {kind: size / dense for kind, size in bytes_of.items()}}
        show(question, results[question])
        write("mnn", results, add=True, sizes=sizes, versions={"MNN": version("MNN")})


if __name__ == "__main__":
    main(sys.argv[1:])
