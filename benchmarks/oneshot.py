"""One-shot pruning of language models: seconds and memory, against a plain loop of SparseGPT.

    python -m benchmarks.oneshot

*Layers*: pruning one layer of random weights to 50%, given the Gram matrix of its inputs. The plain
loop is algorithm 1 of the paper of SparseGPT in float32, column after column. With `history`, the
errors of the report are computed too. ALPS is the function of fmchisel, if it is installed by
`pip install --no-deps fmchisel==0.1.2`. Errors are squared changes of the outputs, relative to the
outputs.

*Blocks*: a block of language models with 1 B and 7 B parameters, without the softmax of its
attention, by `prune_blocks` and by a plain loop that collects a Gram matrix for each layer. Each
runs in a fresh process with two numbers of tokens, 512 in a batch; the line through both gives the
seconds for 128 x 2,048 tokens. Memory is what the peak is above that with the block and its inputs,
for the larger number.

Times are those of the processor on one thread, because machines are shared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import parasparse as ps
from benchmarks.fmchisel_alone import sparsify_weight
from benchmarks.memory import peak
from benchmarks.timing import QUICK, compare, show, threads, write

SPARSITY, DAMPING, COLUMNS = 0.5, 0.01, 128
LAYERS = {  # outputs, inputs
    "1 B, attention": (2048, 2048),
    "1 B, up": (5632, 2048),
    "1 B, down": (2048, 5632),
    "7 B, attention": (4096, 4096),
    "7 B, up": (11008, 4096),
}
BY_ADMM = ("1 B, attention",)
SHAPES = {"1 B": (2048, 5632), "7 B": (4096, 11008)}  # of a block: hidden size, that of its MLP
TOKENS, ALL_TOKENS = {"1 B": (1024, 3072), "7 B": (512, 1536)}, 128 * 2048
if QUICK:
    LAYERS, SHAPES = {"1 B, attention": (64, 64)}, dict.fromkeys(SHAPES, (64, 128))
PLAIN, OURS, REPORTED = "SparseGPT, plain", "parasparse", "obs with `history`"
DENSE = "parasparse, `recompute=False`"


def plain_prune(weight: Tensor, gram: Tensor) -> Tensor:
    """Return the weights of SparseGPT, as the paper writes its algorithm 1, in float32."""
    left, gram, pruned = weight.clone(), gram.float(), torch.empty_like(weight)
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, left.shape[1], COLUMNS):
        stop = start + COLUMNS
        tile, own = left[:, start:stop].clone(), factor[start:stop, start:stop]
        scores, lost = tile.square() / own.diagonal().square(), torch.empty_like(tile)
        least = scores.flatten().sort().values[int(scores.numel() * SPARSITY)]
        for column in range(tile.shape[1]):
            kept = tile[:, column].masked_fill(scores[:, column] <= least, 0.0)
            error = (tile[:, column] - kept) / own[column, column]
            tile[:, column:] -= error.unsqueeze(1) @ own[column, column:].unsqueeze(0)
            pruned[:, start + column], lost[:, column] = kept, error
        left[:, stop:] -= lost @ factor[start:stop, stop:]
    return pruned


def ours(
    layer: nn.Linear, statistics: ps.scores.Statistics, history: list[Any] | None = None, **to: str
) -> Tensor:
    prune = ps.OneShot(SPARSITY, statistics, scope="tensor", history=history, **to)
    return prune({"weight": layer.weight})["weight"].weights


def alps(layer: nn.Linear, gram: Tensor) -> Tensor:
    return sparsify_weight()(layer, {layer: gram.float()}, SPARSITY, percdamp=DAMPING)[1]


def collected(outputs: int, inputs: int) -> tuple[nn.Linear, ps.scores.Statistics]:
    """Return a layer, and the Gram matrix of correlated inputs."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(2 * inputs, 64) @ torch.randn(64, inputs) / 8 + torch.randn(2 * inputs, inputs)
    with torch.no_grad(), ps.scores.collect(layer, grams=True) as statistics:
        layer(x)
    return layer, statistics


def of_processor(function: Callable[[], object]) -> float:
    """Return the milliseconds that the processor works on a call."""
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


@torch.no_grad()
def measure_layer(name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Return timings, and the error of the outputs."""
    layer, statistics = collected(*LAYERS[name])
    gram, weight = statistics.gram("weight"), layer.weight.detach()
    calls: dict[str, Callable[[], Tensor]] = {
        PLAIN: partial(plain_prune, weight, gram),
        f"{OURS}, obs": partial(ours, layer, statistics, update="obs"),
        REPORTED: partial(ours, layer, statistics, [], update="obs"),
    }
    if name in BY_ADMM:
        calls[f"{OURS}, admm"] = partial(ours, layer, statistics, update="admm")
        if find_spec("fmchisel"):
            calls["ALPS"] = partial(alps, layer, gram)
    found: dict[str, Tensor] = {}

    def kept(way: str) -> None:
        found[way] = calls[way]()

    timings = compare(
        {way: partial(kept, way) for way in calls}, repeats=2, warm_up=0, clock=of_processor
    )
    energy = ((weight @ gram.float()) * weight).sum()
    found.pop(REPORTED)  # the same weights
    changes = {way: new - weight for way, new in found.items()}
    return timings, {
        way: float(((change @ gram.float()) * change).sum() / energy)
        for way, change in changes.items()
    }


class Block(nn.Module):
    """The matrices of a block of Llama."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x).sigmoid() * self.k(x) + self.v(x))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def plain_block(block: nn.Module, batches: list[Tensor]) -> None:
    """Prune `block` with a Gram matrix for each layer, then run it on what goes on."""
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    grams = {layer: torch.zeros(2 * (layer.in_features,)) for layer in layers}

    def add(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        grams[layer] += x.T @ x

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    for x in batches:
        block(x)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.weight.copy_(plain_prune(layer.weight, grams.pop(layer)))
    for x in batches:
        block(x)


def our_block(block: nn.Module, batches: list[Tensor], *, recompute: bool = True) -> None:
    rule = ps.OneShot(SPARSITY, update="obs", scope="tensor")
    ps.prune_blocks(nn.Sequential(block), batches, rule, blocks="0", recompute=recompute)


BLOCKS: dict[str, Callable[[nn.Module, list[Tensor]], None]] = {
    PLAIN: plain_block,
    OURS: our_block,
    DENSE: partial(our_block, recompute=False),
}
WAYS = {"1 B": (PLAIN, OURS, DENSE), "7 B": (PLAIN, OURS)}


def measure_block(size: str, way: str, tokens: int) -> dict[str, float]:
    """Return seconds and bytes, measured in this fresh process."""
    torch.manual_seed(0)
    block, batches = Block(*SHAPES[size]), list(torch.randn(tokens, SHAPES[size][0]).split(512))
    with torch.no_grad():
        block(batches[0])
    before = peak()
    seconds = of_processor(lambda: BLOCKS[way](block, batches)) / 1e3
    return {"seconds": seconds, "bytes": peak() - before}


def measured_blocks(size: str) -> dict[str, dict[str, float]]:
    """Return for each way the seconds for both numbers of tokens and for all, and the bytes."""
    found: dict[str, dict[str, float]] = {way: {} for way in WAYS[size]}
    for tokens in TOKENS[size]:
        for way, of in found.items():
            command = [sys.executable, "-m", "benchmarks.oneshot", size, way, str(tokens)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(run.stdout)
            of[f"{tokens:,} tokens, seconds"] = result["seconds"]
            of["bytes"] = result["bytes"]
            print(size, way, tokens, result, flush=True)
    few, many = TOKENS[size]
    for of in found.values():
        first, second = (of[f"{tokens:,} tokens, seconds"] for tokens in (few, many))
        each = (second - first) / (many - few)
        of[f"{ALL_TOKENS:,} tokens, seconds"] = first + each * (ALL_TOKENS - few)
    return found


def main(arguments: list[str]) -> None:
    with threads(1):
        if arguments:
            size, way, tokens = arguments
            print(json.dumps(measure_block(size, way, int(tokens))))
            return
        results, errors = {}, {}
        for name in LAYERS:
            results[f"layer, {name}"], errors[name] = measure_layer(name)
            show(name, results[f"layer, {name}"])
            print("  errors:", errors[name], flush=True)
        versions = {"fmchisel": version("fmchisel")} if find_spec("fmchisel") else {}
        blocks = {size: measured_blocks(size) for size in SHAPES}
        write("oneshot", results, errors=errors, blocks=blocks, versions=versions)


if __name__ == "__main__":
    main(sys.argv[1:])
