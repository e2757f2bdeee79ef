"""What do whole channels save, compared with a library that removes them from the network?

    python -m benchmarks.channels

The same share of the output channels of every layer but the last, by 2-norm. Torch-Pruning
(`pip install torch-pruning`) builds a smaller network: a channel is removed with everything that it
feeds, in activations, batch norm and the weights of the next layers, and layers that are added up
lose the same channels. parasparse ranks each layer separately and doesn't change shapes: zeros are
skipped layer by layer, outputs stay as wide, and the next layers keep the weights of removed
channels. So less is left of Torch-Pruning's network, and more than the share of channels says.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch_pruning
from torch import Tensor, nn
from torchvision.models import resnet18

import parasparse as ps
from benchmarks.timing import compare, show, write

SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)
    )


# A function that makes the network, its last layer, the shape of one sample.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "ResNet-18": (lambda: resnet18(weights=None), "fc", (3, 224, 224)),
    "MLP, 2 x 4096": (perceptron, "4", (1024,)),
}


def ours(dense: nn.Module, last: str, sparsity: float) -> nn.Module:
    channels = ps.Prune(sparsity, pattern=ps.patterns.channel(0, norm=2))
    return ps.squash(ps.sparsify(copy.deepcopy(dense), {last: None, "*": channels}))


def theirs(dense: nn.Module, last: str, sparsity: float, x: Tensor) -> nn.Module:
    model = copy.deepcopy(dense)
    with torch.enable_grad():  # it follows the graph of a forward
        torch_pruning.pruner.MagnitudePruner(
            model, x, importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=sparsity, ignored_layers=[model.get_submodule(last)],
        ).step()  # fmt: skip
    return model


def channels_kept(networks: dict[str, nn.Module], last: str) -> dict[str, float]:
    """Return the share of output channels that both have left, in all layers but the last.

    Raises:
        AssertionError: the two do not do the same job, but for the rounding of a count.
    """
    counts = {name: _counted(model, last) for name, model in networks.items()}
    for layer, number in counts["parasparse"].items():
        if abs(number - counts["Torch-Pruning"][layer]) > 1:
            raise AssertionError(f"{layer} differs in {counts}")
    whole = sum(counts.pop("dense").values())
    return {name: sum(found.values()) / whole for name, found in counts.items()}


def _counted(model: nn.Module, last: str) -> dict[str, int]:
    return {
        name: int(module.weight.flatten(1).any(1).sum())
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name != last
    }


def bytes_of(networks: dict[str, nn.Module]) -> dict[str, int]:
    """Return the sizes of the checkpoints; Torch-Pruning's does not say which network it fits."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        for name, model in networks.items():
            save = ps.save if name == "parasparse" else torch.save
            save(model.state_dict(), path)
            found[name] = path.stat().st_size
    return found


def accelerated(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy that skips zeros; one sample measures convolutions with eight as well."""
    fast = ps.accelerate(copy.deepcopy(model), x)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
    return fast


@torch.no_grad()
def main() -> None:
    results, shares, sizes = {}, {}, {}
    for name, (build, last, shape) in NETWORKS.items():
        torch.manual_seed(0)
        dense = build().eval()
        for sparsity in SPARSITIES:
            networks = {
                "dense": dense,
                "Torch-Pruning": theirs(dense, last, sparsity, torch.randn(1, *shape)),
                "parasparse": ours(dense, last, sparsity),
            }
            question = f"{name}, {sparsity:.0%} of channels"
            shares[question], sizes[question] = channels_kept(networks, last), bytes_of(networks)
            fast = accelerated(networks["parasparse"], torch.randn(1, *shape))
            for batch in (1, 8):
                x = torch.randn(batch, *shape)
                calls = {n: partial(m, x) for n, m in {**networks, "parasparse": fast}.items()}
                results[f"{question}, batch {batch}"] = timings = compare(calls, repeats=21)
                show(f"{question}, batch {batch}", timings)
            print("  channels kept:", shares[question], "bytes:", sizes[question])
    versions = {"torch-pruning": metadata.version("torch-pruning")}
    write("channels", results, channels_kept=shares, bytes=sizes, versions=versions)


if __name__ == "__main__":
    main()
