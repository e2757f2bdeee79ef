"""Does sparse training pay: compact weights against dense ones, masks and SparseLab?

    python -m benchmarks.training [NETWORK ...]  # results of other networks stay

A step is a forward pass, a backward pass and a step of Adam. Networks: an MLP 784-d-d-10, a block
of a transformer (attention 1024 wide, feed-forward 4096), and a language model of two LSTM layers.
All weights of two dimensions are pruned at random, but not the last layer of the MLP. SparseLab
(`pip install sparselab`) is left out where it is not installed, and has linear layers only.
torch's prune is left out for the block: it computes a weight before its module runs, and the output
projection of attention never does.

Memory is the growth of the peak of a fresh process that makes the network and its optimizer and
takes two steps.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import parasparse as ps
from benchmarks.memory import peak
from benchmarks.timing import QUICK, compare, show, threads, write

try:
    import sparselab
except ImportError:
    sparselab = None

SPARSITIES = (0.95,) if QUICK else (0.8, 0.9, 0.95, 0.98, 0.99)


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(1024, 16, 4096, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


class Language(nn.Module):
    """Two LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1024, 1024, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lstm(x)[0]
        return result


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def random(*shape: int) -> Callable[[], Tensor]:
    return partial(torch.randn, *shape)


# A function that makes the network, and one that makes its input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        f"MLP {width}, batch {batch}": (partial(mlp, width), random(batch, 784))
        for width in (2048, 4096)
        for batch in (32, 64, 128, 512)
    },
    "MLP 1024, batch 512": (partial(mlp, 1024), random(512, 784)),
    "transformer block, 128 tokens": (Block, random(1, 128, 1024)),
    "transformer block, 1024 tokens": (Block, random(1, 1024, 1024)),
    "LSTM, 32 sequences of 16": (Language, random(32, 16, 1024)),
}


def pruned(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights to prune: all but the last layer of an MLP."""
    found = [
        (module, name)
        for module in model.modules()
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 2
    ]
    return found[:-1] if isinstance(model, nn.Sequential) else found


def made(way: str, build: Callable[[], nn.Module], sparsity: float) -> nn.Module:
    """Return a network that trains in one of the ways."""
    torch.manual_seed(0)
    with torch.device("meta" if way == "compact" else "cpu"):
        model = build()
    names = {id(module): path for path, module in model.named_modules()}
    weights = [f"{names[id(module)]}.{name}".strip(".") for module, name in pruned(model)]
    if way == "compact":  # without a dense weight at any time
        return ps.materialize(model, dict.fromkeys(weights, sparsity))
    if way == "masked":
        rule = ps.Prune(sparsity, score=ps.scores.random)
        return ps.sparsify(model, dict.fromkeys(weights, rule))
    if way == "torch's prune":
        for module, name in pruned(model):
            prune.random_unstructured(module, name, sparsity)
    if way == "SparseLab":
        # By `id` of a layer, so that a new one may meet what belongs to one that is gone.
        sparselab.ops._transpose_cache.clear()
        for name, layer in list(model.named_children())[:-1]:
            if isinstance(layer, nn.Linear):
                sizes = layer.in_features, layer.out_features
                setattr(model, name, sparselab.SparseLinear(*sizes, sparsity=sparsity))
    return model


def step_of(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return one step of training."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    target = torch.randn_like(model(x).detach())

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()

    return step


def ways(network: str) -> list[str]:
    if not network.startswith("MLP"):
        return ["dense", "masked", "compact"]
    others = [] if sparselab is None else ["SparseLab"]
    return ["dense", "masked", "torch's prune", "compact", *others]


def memory_of(network: str, way: str, sparsity: float) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--peak",
               network, way, str(sparsity)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_peak(network: str, way: str, sparsity: str) -> int:
    """Return the growth of the peak of this fresh process over two steps."""
    build, inputs = NETWORKS[network]
    step_of(made(way, partial(mlp, 64), 0.9), torch.randn(8, 784))()  # imports what it needs
    before = peak()
    step = step_of(made(way, build, float(sparsity)), inputs())
    step()
    step()
    return peak() - before


def main(names: list[str]) -> None:
    results, memory = {}, {}
    for network in names or NETWORKS:
        build, inputs = NETWORKS[network]
        for sparsity in SPARSITIES:
            for number in (1,) if QUICK else (1, 2):
                with threads(number):
                    x = inputs()
                    steps = {way: step_of(made(way, build, sparsity), x) for way in ways(network)}
                    question = f"{network}, {sparsity:.0%}, {number} threads"
                    results[question] = compare(steps, repeats=9)
                    show(question, results[question])
            if sparsity == 0.95:
                memory[network] = {way: memory_of(network, way, sparsity) for way in ways(network)}
                print("  memory:", memory[network], flush=True)
    versions = {} if sparselab is None else {"sparselab": metadata.version("sparselab")}
    write("training", results, add=bool(names), memory=memory, versions=versions)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(measure_peak(*sys.argv[2:]))
    else:
        main(sys.argv[1:])
