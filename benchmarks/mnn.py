"""What do zeros save in MNN?

    python -m benchmarks.mnn

Needs `pip install MNN==3.6.1 onnx onnxscript torchvision`. Each network is pruned, squashed and
exported to ONNX, then converted twice: as it is, and with `--detectSparseSpeedUp`. Both run in turn
in one process on one thread, and time is processor time, so other programs disturb it little. One
sample, random weights, unstructured zeros in every weight that a sparsity alone reaches.
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
OPTIONS = {"dense": [], "sparse": ["--detectSparseSpeedUp"]}
NETWORKS = {"ResNet-50": resnet50, "ViT-B/16": vit_b_16}
SPARSITIES = (0.8, 0.9, 0.95)


def converted(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    """Write `model` as ONNX and as two MNN files; return these."""
    program = folder / "model.onnx"
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(
        model, (x,), program, dynamo=True, verbose=False, external_data=False, **names
    )
    files = {}
    for name, options in OPTIONS.items():
        files[name] = folder / f"{name}.mnn"
        paths = ["--modelFile", str(program), "--MNNModel", str(files[name])]
        command = [sys.executable, "-c", CONVERT, "-f", "ONNX", *paths, *options]
        subprocess.run(command, check=True, capture_output=True)
    return files


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
def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 224, 224)
    results, sizes = {}, {}
    for name, build in NETWORKS.items():
        for sparsity in SPARSITIES[-1:] if QUICK else SPARSITIES:
            torch.manual_seed(0)
            model = ps.squash(ps.sparsify(build(weights=None).eval(), sparsity))
            expected = model(x)
            with tempfile.TemporaryDirectory() as folder:
                files = converted(model, x, Path(folder))
                calls = {kind: runner(file, x) for kind, file in files.items()}
                for call in calls.values():
                    torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-4)
                timed = {kind: partial(processor_time, call) for kind, call in calls.items()}
                question = f"{name}, {sparsity:.0%}"
                results[question] = compare(timed, repeats=41, clock=own)
                sizes[question] = files["sparse"].stat().st_size / files["dense"].stat().st_size
            show(f"{question}, file {sizes[question]:.3f}", results[question])
    write("mnn", results, sizes=sizes, versions={"MNN": version("MNN")})


if __name__ == "__main__":
    main()
