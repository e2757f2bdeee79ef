"""One runtime in a process of its own, which `benchmarks.runtimes` starts.

    python -m benchmarks.runtime_process RUNTIME FOLDER THREADS

The folder holds a network as `model.pt` and `model.onnx`, and its input as `x.npy`. The output is
written as `RUNTIME.npy`. Then each line on standard input asks for a turn of at least 0.2 seconds,
and the answer is the least processor time of a call and the least wall time, in milliseconds.
DeepSparse runs this in an environment without torch, so only the functions import what they need.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

Call = Callable[[], np.ndarray]
TURN = 0.2  # seconds

# The command `mnnconvert` calls pip when it starts; the module behind it does not.
CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


def eager(folder: Path, x: np.ndarray, threads: int, *, fast: bool = False) -> Call:
    """Load the network in torch."""
    import torch

    from benchmarks.networks import for_inference

    torch.set_num_threads(threads)
    model, given = torch.load(folder / "model.pt", weights_only=False), torch.from_numpy(x)

    @torch.no_grad()
    def call() -> np.ndarray:
        return model(given).numpy()

    if fast:
        model = for_inference(model, given)
    return call


def parasparse(folder: Path, x: np.ndarray, threads: int) -> Call:
    """Load the network in torch, and accelerate it."""
    return eager(folder, x, threads, fast=True)


def onnxruntime(folder: Path, x: np.ndarray, threads: int) -> Call:
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(folder / "model.onnx", options)
    return lambda: session.run(None, {"x": x})[0]


def openvino(folder: Path, x: np.ndarray, threads: int) -> Call:
    """Load the network in float32; on some processors bfloat16 is the default."""
    import openvino as runtime

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = runtime.compile_model(folder / "model.onnx", "CPU", options)
    request = compiled.create_infer_request()
    return lambda: request.infer({"x": x})[compiled.output(0)]


def mnn(folder: Path, x: np.ndarray, threads: int) -> Call:
    """Convert the network with `--detectSparseSpeedUp`, and load it in full precision."""
    import MNN

    files = ["--modelFile", str(folder / "model.onnx"), "--MNNModel", str(folder / "model.mnn")]
    command = [sys.executable, "-c", CONVERT, "-f", "ONNX", *files, "--detectSparseSpeedUp"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    network = MNN.nn.load_module_from_file(
        str(folder / "model.mnn"), ["x"], ["y"],
        precision_mode=MNN.expr.PrecisionMode.High, thread_num=threads,
    )  # fmt: skip
    kind = MNN.expr.float if x.dtype == np.float32 else MNN.expr.int
    given = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW, kind)
    given.write(x if x.dtype == np.float32 else x.astype(np.int32))

    def call() -> np.ndarray:
        return MNN.expr.convert(network.forward(given), MNN.expr.NCHW).read().copy()

    return call


def deepsparse(folder: Path, x: np.ndarray, threads: int) -> Call:
    from deepsparse import Engine

    engine = Engine(model=str(folder / "model.onnx"), batch_size=len(x), num_cores=threads)
    return lambda: engine.run([x])[0]


RUNTIMES = {
    "torch": eager,
    "parasparse": parasparse,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
    "MNN": mnn,
    "DeepSparse": deepsparse,
}


def turn(call: Call) -> tuple[float, float]:
    """Return the least processor time and the least wall time of a call, in milliseconds."""
    processor, wall, until = [], [], time.perf_counter() + TURN
    while not wall or time.perf_counter() < until:
        starts = time.process_time(), time.perf_counter()
        call()
        processor.append(time.process_time() - starts[0])
        wall.append(time.perf_counter() - starts[1])
    return min(processor) * 1e3, min(wall) * 1e3


def main(name: str, folder: Path, threads: int) -> None:
    warnings.filterwarnings("ignore")
    if hasattr(os, "sched_setaffinity"):  # MNN uses more threads in some runs
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some runtimes print
    call = RUNTIMES[name](folder, np.load(folder / "x.npy"), threads)
    np.save(folder / f"{name}.npy", call())
    print("loaded", file=answers, flush=True)
    for _ in sys.stdin:
        print(*turn(call), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
