"""Global magnitude masks for 90 % of a large bf16 model: does cost stay linear, memory small?

    python -m benchmarks.scale

Time is compared with one pass of an allocating `abs` over the weights, layer by layer, in the same
run. Memory is the growth of a fresh process's peak over its size with the model in place, in bytes
a weight: the masks themselves are 1.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

import parasparse as ps
from benchmarks._timing import compare, show, threads, write
from benchmarks.selection import peak

RULES = ps.Prune(0.9, scope="global")
# Width and number of square layers.
SIZES = {"10 M": (800, 16), "100 M": (2048, 24), "1 B": (4096, 60)}


def made(size: str) -> nn.Module:
    """Return a model in bf16, with weights as a fresh one has them."""
    width, layers = SIZES[size]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return model


def measure_memory(size: str) -> float:
    """Return the bytes a weight that `sparsify` takes, in this process, which must be new."""
    ps.sparsify(nn.Linear(600, 600, dtype=torch.bfloat16), RULES)  # loads what the first use loads
    model = made(size)
    before = peak()
    ps.sparsify(model, RULES)
    return (peak() - before) / sum(parameter.numel() for parameter in model.parameters())


def memory(size: str) -> float:
    """Return the same, measured in a process of its own."""
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
