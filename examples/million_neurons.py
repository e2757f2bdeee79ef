"""Train an MLP with more than a million neurons by SET, with memory for its connections alone.

    python examples/million_neurons.py [--data FOLDER]

trains on the digits of scikit-learn, or on MNIST if --data names its folder. The dense weights
would need hundreds of gigabytes. The model is built on the meta device, where they cost nothing,
and `materialize` draws the connections at random. SET then moves some of them after each epoch.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import parasparse as ps

GB = 1e9


def options(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=Path, help="folder of MNIST instead of the digits of scikit-learn")
    add("--neurons", type=int, default=1_000_000, help="in all hidden layers together")
    add("--layers", type=int, default=3, help="hidden layers")
    add("--epsilon", type=float, default=5.0, help="connections per input and output of a layer")
    add("--steps", type=int, default=94)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def images(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images as rows and their labels, then those of the test."""
    if folder is not None:
        from data import mnist

        (x, y), (test_x, test_y) = (part.tensors for part in mnist(folder))
        return x.flatten(1), y, test_x.flatten(1), test_y
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return x[:1500], y[:1500], x[1500:], y[1500:]


def mlp(inputs: int, width: int, layers: int) -> nn.Module:
    sizes = [inputs, *[width] * layers]
    hidden = [(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, 10))


def sparse_from_meta(args: argparse.Namespace, inputs: int) -> nn.Module:
    """Return the network with connections drawn by Erdos-Renyi, as the paper on SET has them."""
    width = math.ceil(args.neurons / args.layers)
    with torch.device("meta"):
        model = mlp(inputs, width, args.layers)
    shapes = [p.shape for p in model.parameters() if p.ndim == 2]
    entries = sum(shape.numel() for shape in shapes)
    connections = round(args.epsilon * sum(map(sum, shapes)))
    er = ps.Prune(
        1 - connections / entries, score=ps.scores.random, distribution=ps.distributions.erdos_renyi
    )
    ps.materialize(model, er, generator=torch.Generator().manual_seed(args.seed))
    held = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
    print(
        f"{args.layers * width + 10:,} neurons, {connections:,} of {entries:,} connections\n"
        f"memory of the model: {held / GB:.2f} GB; its dense weights would have "
        f"{4 * entries / GB:,.1f} GB",
        flush=True,
    )
    return model


def peak_memory() -> float:
    """Return the most memory that this process has had so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def accuracy(model: nn.Module, x: Tensor, y: Tensor, size: int) -> float:
    with torch.no_grad():
        right = sum(
            (model(a).argmax(1) == b).sum().item()
            for a, b in zip(x.split(size), y.split(size), strict=True)
        )
    return right / len(y)


def train(
    model: nn.Module, args: argparse.Namespace, x: Tensor, y: Tensor
) -> tuple[list[float], list[float]]:
    """Train and print; return the seconds of each step, and of each move of connections."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    dst = ps.sparse_evolutionary_training(model, "zeros", optimizer, init="resume")
    steps_per_epoch = math.ceil(len(x) / args.batch_size)
    seconds: list[float] = []
    moves: list[float] = []
    start = time.perf_counter()
    while len(seconds) < args.steps:
        for batch in torch.randperm(len(x)).split(args.batch_size)[: args.steps - len(seconds)]:
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            dst.step()
            seconds.append(time.perf_counter() - begin)
            if len(seconds) % 10 == 0 or len(seconds) == args.steps:
                print(
                    f"step {len(seconds)}/{args.steps}: loss {loss.item():.3f}, "
                    f"{time.perf_counter() - start:.0f} s, peak {peak_memory():.2f} GB",
                    flush=True,
                )
        if len(seconds) % steps_per_epoch == 0 and len(seconds) < args.steps:
            begin = time.perf_counter()
            dst.at_end_of_epoch()
            moves.append(time.perf_counter() - begin)
            overlap = dst.history[-1].overlap
            print(f"SET moved connections: {overlap:.1%} are those of the start", flush=True)
    return seconds, moves


def main(arguments: list[str] | None = None) -> None:
    args = options(arguments)
    torch.manual_seed(args.seed)
    x, y, test_x, test_y = images(args.data)
    model = sparse_from_meta(args, x.shape[1])
    seconds, moves = train(model, args, x, y)
    print(f"accuracy on {len(test_y)} test images: {accuracy(model, test_x, test_y, 64):.3f}")
    print(f"seconds per step: {sum(seconds) / len(seconds):.2f}")
    if moves:
        print(f"seconds per move of connections: {sum(moves) / len(moves):.2f}")
    print(f"peak memory: {peak_memory():.2f} GB")


if __name__ == "__main__":
    main()
