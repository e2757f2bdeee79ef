"""Global magnitude masks at 90% of a large bf16 model: is the cost linear, the memory small?

    python -m benchmarks.scale

Time is compared with one pass of an allocating `abs` over the weights, layer by layer, in the same
run. Memory is the growth of the peak of a fresh process, beyond its size with the model, in bytes
per weight. The masks alone are 1 byte per weight.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

import parasparse as ps
from benchmarks.memory import peak
from benchmarks.timing import compare, show, threads, write

RULES = ps.Prune(0.9, scope="global")
# Width and number of square layers.
SIZES = {"10 M": (800, 16), "100 M": (2048, 24), "1 B": (4096, 60)}


def made(size: str) -> nn.Module:
    """Return a freshly initialized model in bf16."""
    width, layers = SIZES[size]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return model


def measure_memory(size: str) -> float:
    """Return the bytes per weight that `sparsify` needs, measured in this fresh process."""
    ps.sparsify(nn.Linear(600, 600, dtype=torch.bfloat16), RULES)  # loads what the first use loads
    model = made(size)
    before = peak()
    ps.sparsify(model, RULES)
    return (peak() - before) / sum(parameter.numel() for parameter in model.parameters())


def memory(size: str) -> float:
    """Return the same, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.scale", size]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    results, bytes_each, each = {}, {}, {}
    for size, repeats in (("10 M", 9), ("100 M", 5), ("1 B", 3)):
        model = made(size)
        number = sum(parameter.numel() for parameter in model.parameters())

        def magnitudes(model: nn.Module = model) -> None:
            for parameter in model.parameters():
                parameter.detach().abs()

        def masks(model: nn.Module = model) -> nn.Module:
            return ps.sparsify(model, RULES)

        for count in (1, 2):
            with threads(count):
                question = f"{size}, {count} thread(s)"
                masked = {"abs": magnitudes, "sparsify": lambda: ps.unsparsify(masks())}
                results[question] = compare(masked, repeats=repeats, warm_up=1)
                show(question, results[question])
                each[question] = results[question]["sparsify"].median * 1e6 / number
                print(f"  {each[question]:.2f} ns a weight")
        del model
        bytes_each[size] = memory(size)
        print(f"  {bytes_each[size]:.3f} bytes a weight above the model, at the peak")
    write("scale", results, peak_bytes_per_weight=bytes_each, nanoseconds_per_weight=each)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(measure_memory(sys.argv[1]))
    else:
        main()
