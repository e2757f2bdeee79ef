"""What do removed channels save: against masks, against `accelerate`, against Torch-Pruning?

    python -m benchmarks.channels [NETWORK ...]  # results of other networks stay

`coupled` chooses the same share of the channels of each layer, by 2-norm, with all that belongs to
them. The network is timed dense, with the masks on ("masked"), squashed and accelerated, and cut by
`shrink` ("parasparse"). Torch-Pruning (`pip install torch-pruning`) removes the same channels from
the dense network, layer by layer, as far as it can; it is left out where it fails, or where its
network has other shapes. Bytes are those of a state dict; of the accelerated network, packed.
Memory is the growth of the peak of a fresh process that loads a network and runs it once on 8
samples. With BENCH_QUICK=1, only half of the channels are removed.

Planning is timed against one forward pass of the same inputs, and Torch-Pruning's tracing. The
units of a Llama of 70 billion weights are found on the meta device; its peak is that of the whole
process.
"""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import parasparse as ps
from benchmarks.memory import peak
from benchmarks.networks import Logits, bert, images, tokens
from benchmarks.timing import QUICK, Timing, compare, show, write

try:
    import torch_pruning
except ImportError:
    torch_pruning = None

SPARSITIES = (0.5,) if QUICK else (0.3, 0.5, 0.7, 0.9)
PATIENCE = 60  # seconds for one call of Torch-Pruning
Networks = dict[str, nn.Module]


def llama() -> nn.Module:
    """About 100 million parameters, with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=640, intermediate_size=1792, num_hidden_layers=12,
        num_attention_heads=10, num_key_value_heads=5, use_cache=False,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config))


# A function that makes the network, and one that makes inputs of a batch size.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "ResNet-18": (models.resnet18, images),
    "ResNet-50": (models.resnet50, images),
    "MobileNetV3": (models.mobilenet_v3_large, images),
    "ViT-B/16": (models.vit_b_16, images),
    "BERT-base": (bert, tokens),
    "Llama, 100 M": (llama, tokens),
}


def masked(dense: nn.Module, units: Any, sparsity: float) -> nn.Module:
    return ps.sparsify(copy.deepcopy(dense), units.rules(sparsity))


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def theirs(dense: nn.Module, plan: ps.Shrinkage, x: Tensor) -> nn.Module:
    """Return what Torch-Pruning makes of `dense` if it removes the channels of `plan`.

    Raises:
        Exception: it cannot, or its network has other shapes.
    """
    model = copy.deepcopy(dense)
    wanted = {row.name: row for row in plan.rows}
    with torch.enable_grad():  # it follows the graph of a forward
        graph = torch_pruning.DependencyGraph().build_dependency(model, x, verbose=False)
    for name, layer in model.named_modules():
        row = wanted.get(f"{name}.weight")
        if row is None or 0 not in row.kept or len(layer.weight) == row.new_shape[0]:
            continue  # it may be gone, together with another layer
        removed = sorted(set(range(row.shape[0])) - set(row.kept[0]))
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, prune, removed).prune()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    odd = [name for name, row in wanted.items() if shapes.get(name, row.new_shape) != row.new_shape]
    if odd:
        raise ValueError(f"{len(odd)} tensors have other shapes, such as {odd[0]}")
    model(x)
    return model


def networks_of(
    dense: nn.Module, units: Any, sparsity: float, x: Tensor
) -> tuple[Networks, ps.Shrinkage]:
    """Return each way to drop the same channels, and the plan."""
    under_masks = masked(dense, units, sparsity)
    plan = ps.plan_shrink(under_masks, x)
    found = {
        "dense": dense,
        "masked": under_masks,
        "accelerated": ps.accelerate(ps.squash(copy.deepcopy(under_masks)), x),
        "parasparse": ps.shrink(copy.deepcopy(under_masks), x, check=False),
    }
    want = under_masks(x)
    for name in ("accelerated", "parasparse"):
        torch.testing.assert_close(found[name](x), want, rtol=1e-3, atol=1e-4)
    if torch_pruning is not None:
        try:
            with bounded(PATIENCE):
                found["Torch-Pruning"] = theirs(dense, plan, x)
        except Exception as error:
            print(f"  Torch-Pruning: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return found, plan


def channels_kept(dense: nn.Module, found: Networks) -> dict[str, float]:
    """Return the share of output channels that each smaller network has left."""
    layers = [n for n, m in dense.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    counts = {
        way: sum(len(found[way].get_submodule(layer).weight) for layer in layers)
        for way in ("dense", "parasparse", "Torch-Pruning") if way in found
    }  # fmt: skip
    whole = counts.pop("dense")
    return {way: count / whole for way, count in counts.items()}


def bytes_of(found: Networks) -> dict[str, int]:
    """Return the sizes of the checkpoints."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        for way, model in found.items():
            if way == "accelerated":
                ps.save(ps.dense_state_dict(found["masked"]), path)
            else:
                torch.save(model.state_dict(), path)
            sizes[way] = path.stat().st_size
    return sizes


def memory_of(found: Networks, name: str) -> dict[str, int]:
    """Return the memory that each network needs for one call on 8 samples."""
    grown = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        for way, model in found.items():
            torch.save(model, path)
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.channels", "--peak",
                       name, str(path)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            grown[way] = int(done.stdout.split()[-1])
    return grown


@torch.no_grad()
def measure_peak(name: str, path: str) -> int:
    """Return the growth of the peak of this fresh process when it loads and runs a network."""
    build, inputs = NETWORKS[name]
    with torch.device("meta"):
        build()  # imports what the network needs
    nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 8, 8))
    before = peak()
    torch.load(path, weights_only=False)(inputs(8))
    return peak() - before


def measure_large() -> dict[str, float]:
    """Find the units of a Llama of 70 billion weights that has no values, in a fresh process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, 8, dtype=torch.long)
    start, work = time.perf_counter(), time.process_time()
    ps.coupled(model.eval(), {"input_ids": ids})
    return {
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - work,
        "peak_bytes": peak(),
    }


def large() -> dict[str, dict[str, float]]:
    """Return the same, measured in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.channels", "--large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print("Llama, 70 B:", found, flush=True)
    return {"Llama, 70 B": found}


def planning(dense: nn.Module, units: Any, x: Tensor) -> dict[str, Timing]:
    """Time the plan of a network with half of its channels, and what it may be compared with."""
    under_masks = masked(dense, units, 0.5)
    calls: dict[str, Callable[[], object]] = {
        "forward": partial(dense, x),
        "parasparse": partial(ps.plan_shrink, under_masks, x),
    }

    def trace() -> None:
        with torch.enable_grad():
            torch_pruning.DependencyGraph().build_dependency(copy.deepcopy(dense), x, verbose=False)

    if torch_pruning is not None:
        try:
            with bounded(PATIENCE):
                trace()
            calls["Torch-Pruning"] = trace
        except Exception as error:
            print(f"  Torch-Pruning cannot trace it: {type(error).__name__}: {str(error)[:200]}")
    return compare(calls, repeats=5, warm_up=1)


@torch.no_grad()
def main(names: list[str]) -> None:
    results, shares, sizes, memory, plans = {}, {}, {}, {}, {}
    for name in names or NETWORKS:
        build, inputs = NETWORKS[name]
        torch.manual_seed(0)
        dense, x = build().eval(), inputs(1)
        units = ps.coupled(dense, x, norm=2)
        plans[name] = planning(dense, units, x)
        show(f"{name}, planning", plans[name])
        for sparsity in SPARSITIES:
            question = f"{name}, {sparsity:.0%} of channels"
            found, plan = networks_of(dense, units, sparsity, x)
            shares[question] = channels_kept(dense, found)
            sizes[question], memory[question] = bytes_of(found), memory_of(found, name)
            for batch in (1, 8):
                calls = {way: partial(model, inputs(batch)) for way, model in found.items()}
                timings = compare(calls, repeats=21 if batch == 1 else 9)
                show(f"{question}, batch {batch}", timings)
                results[f"{question}, batch {batch}"] = timings
            adds = [f"{number / 1e9:.2f}" for number in plan.multiply_adds]
            print("  channels kept:", shares[question], "billion multiply-adds:", *adds)
            print("  bytes:", sizes[question], "memory:", memory[question], flush=True)
    plans_as_dicts = {
        name: {way: asdict(timing) for way, timing in timings.items()}
        for name, timings in plans.items()
    }
    versions = {}
    if torch_pruning is not None:
        versions["torch-pruning"] = metadata.version("torch-pruning")
    write(
        "channels", results, add=bool(names), channels_kept=shares, bytes=sizes, memory=memory,
        planning=plans_as_dicts, large={} if names or QUICK else large(), versions=versions,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(measure_peak(*sys.argv[2:]))
    elif sys.argv[1:] == ["--large"]:
        print(json.dumps(measure_large()))
    else:
        main(sys.argv[1:])
