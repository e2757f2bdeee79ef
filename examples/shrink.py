"""Prune the channels of a small ResNet gradually, remove them, fine-tune and export it.

    python examples/shrink.py --data data

The data are MNIST. Takes one to two minutes on two cores. Writes `shrink.png`, a picture of the
widths before and after, `small.pt` with the weights and the plan, and `small.onnx` to `--out`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import onnxruntime
import torch
from data import mnist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import parasparse as ps

mpl.use("Agg")
from matplotlib import pyplot as plt

Step = Callable[[], None]


class Block(nn.Module):
    """Two convolutions, and a sum with what went in."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, after a ReLU."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, 2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epochs: int,
    what: str, after_step: Step = lambda: None,
) -> None:  # fmt: skip
    model.train()
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            after_step()
            total += loss.item()
        seconds, mean = time.perf_counter() - start, total / len(loader)
        print(f"  {what}: epoch {epoch}/{epochs}, loss {mean:.3f}, {seconds:.1f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    x, y = test.tensors
    right = [model(part).argmax(1) for part in x.split(1000)]
    return (torch.cat(right) == y).float().mean().item()


@torch.no_grad()
def milliseconds(calls: dict[str, Step], repeats: int = 30) -> dict[str, float]:
    """Return the median time of each call, by turns so that they meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def picture(dense: nn.Module, small: nn.Module, path: Path) -> None:
    """Draw the number of output channels of each layer."""
    layers = [n for n, m in dense.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for model, color, label in ((dense, "#bbccdd", "before"), (small, "#4477aa", "after")):
        widths = [len(model.get_submodule(layer).weight) for layer in layers]
        axes.barh(layers, widths, color=color, label=label)
    axes.invert_yaxis()
    axes.set(xlabel="output channels", title="Channels before and after `shrink`")
    axes.legend()
    figure.savefig(path, dpi=120)


def exported(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """Export `model` to ONNX; return a function that runs it with onnxruntime."""
    torch.onnx.export(
        model, (x,), path, dynamo=True, verbose=False, external_data=False,
        input_names=["x"], output_names=["y"],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def pruned(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epochs: int,
    sparsity: float,
) -> None:  # fmt: skip
    """Drop channels while `model` trains, in the first three quarters of `epochs`."""
    units = ps.coupled(model, next(iter(loader))[0][:1], norm=2)
    print(f"2. prune {sparsity:.0%} of {units} while training")
    steps = epochs * len(loader)
    pruner = ps.GradualPruning(
        model, units.rules(sparsity), optimizer,
        schedule=ps.schedules.Cubic(0.0, 1.0, stop=3 * steps // 4), every=max(1, steps // 20),
    )  # fmt: skip
    train(model, optimizer, loader, epochs, "pruning", pruner.step)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=3, help="dense, and while pruning")
    parser.add_argument("--train-size", type=int, default=12_000)
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of channels to drop")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    data, test = mnist(args.data)
    data = TensorDataset(*(tensor[: args.train_size] for tensor in data.tensors))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = resnet()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)

    print("1. train the dense network")
    train(model, optimizer, loader, args.epochs, "dense")
    dense, reached = copy.deepcopy(model), {"dense": accuracy(model, test)}

    pruned(model, optimizer, loader, args.epochs, args.sparsity)
    reached["masked"] = accuracy(model, test)

    print("3. remove the channels, with the state of the optimizer")
    x = test.tensors[0][:16]
    with torch.no_grad():
        masked_model, before = ps.squash(copy.deepcopy(model)), model(x)
        plan = ps.plan_shrink(model, x)
        ps.shrink(model, x, optimizer=optimizer)
        change = (model(x) - before).abs().max().item()
    print(plan)
    print(f"   changes outputs by {change:.1e} at most")
    reached["small"] = accuracy(model, test)

    print("4. fine-tune the smaller network, and export it")
    train(model, optimizer, loader, 1, "small")
    reached["fine-tuned"] = accuracy(model, test)
    torch.save({"model": model.state_dict(), "plan": plan.to_json()}, args.out / "small.pt")
    picture(dense, model, args.out / "shrink.png")
    networks = {
        "dense": dense, "masked": masked_model, "small": model,
        "dense, ONNX": exported(dense, x, args.out / "dense.onnx"),
        "small, ONNX": exported(model, x, args.out / "small.onnx"),
    }  # fmt: skip
    times = milliseconds({name: partial(network, x) for name, network in networks.items()})
    for name, share in reached.items():
        print(f"accuracy, {name}: {share:.4f}")
    for name, median in times.items():
        print(f"ms for {len(x)} images, {name}: {median:.2f}")
    for name in ("dense", "small"):
        print(f"bytes, {name}.onnx: {(args.out / f'{name}.onnx').stat().st_size:,}")


if __name__ == "__main__":
    main()
