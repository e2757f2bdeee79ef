"""Global magnitude masks at 90%: time, memory, and whether the cost stays linear.

    python -m benchmarks.selection

Memory is the growth of the peak of a fresh process, beyond its size with the weights, in bytes per
weight. torch.nn.utils.prune builds float masks and masked weights, and the others bool masks.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import parasparse as ps
from benchmarks.memory import peak
from benchmarks.timing import compare, show, threads, write

Weights = dict[str, Tensor]
SPARSITY = 0.9


def parasparse(weights: Weights) -> list[Tensor]:
    return list(ps.Prune(SPARSITY, scope="global")(weights).values())


def kthvalue(weights: Weights) -> list[Tensor]:
    scores = torch.cat([weight.abs().flatten() for weight in weights.values()])
    lowest = scores.kthvalue(round(scores.numel() * SPARSITY)).values
    sizes = [weight.numel() for weight in weights.values()]
    return [part > lowest for part in scores.split(sizes)]


def topk(weights: Weights) -> list[Tensor]:
    scores = torch.cat([weight.abs().flatten() for weight in weights.values()])
    kept = scores.numel() - round(scores.numel() * SPARSITY)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[torch.topk(scores, kept, sorted=False).indices] = True
    return list(mask.split([weight.numel() for weight in weights.values()]))


def global_unstructured(weights: Weights) -> list[Tensor]:
    module = nn.Module()
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))
    targets = [(module, name) for name in weights]
    prune.global_unstructured(targets, prune.L1Unstructured, amount=SPARSITY)
    return [getattr(module, f"{name}_mask") for name in weights]


PEERS: dict[str, Callable[[Weights], list[Tensor]]] = {
    f.__name__: f for f in (parasparse, kthvalue, topk, global_unstructured)
}


def draw(total: int) -> Weights:
    """Return twenty tensors with `total` weights altogether."""
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.empty(total // 20).normal_(generator=generator) for i in range(20)}


def measure_memory(name: str, total: int) -> float:
    """Return the bytes per weight that `name` needs, measured in this fresh process."""
    PEERS[name](draw(20_000))  # loads everything that the first use loads
    weights = draw(total)
    before = peak()
    masks = PEERS[name](weights)
    assert sum(mask.numel() for mask in masks) == total
    return (peak() - before) / total


def memory(name: str, total: int) -> float:
    """Return the same, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.selection", name, str(total)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    results, bytes_each = {}, {}
    for total, repeats in ((1_000_000, 15), (11_000_000, 9), (100_000_000, 3)):
        weights = draw(total)
        calls = {name: partial(f, weights) for name, f in PEERS.items()}
        for number in (1, 2):
            with threads(number):
                question = f"{total:,} weights, {number} thread(s)"
                # The largest takes a minute a round, and the sizes before it have warmed up.
                warm_up = 1 if repeats > 3 else 0
                results[question] = compare(calls, repeats=repeats, warm_up=warm_up)
                show(question, results[question])
        del weights, calls
        if total > 1_000_000:  # a small one drowns in the allocator's pages
            bytes_each[f"{total:,} weights"] = {name: memory(name, total) for name in PEERS}
            print("  bytes a weight, at the peak:", bytes_each[f"{total:,} weights"])
    write("selection", results, peak_bytes_per_weight=bytes_each)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure_memory(sys.argv[1], int(sys.argv[2])))
    else:
        main()
