"""Do compact weights train as masked ones do, and how much faster?

    python -m benchmarks.mnist_compact FOLDER

FOLDER holds MNIST. LeNet-300-100 with 5% of its weights over three seeds, and an MLP
784-4096-4096-10 with 5% and 2% of its first two weights. The places are random. The networks of a
seed start from the same values and take each step in turn, on the same batch, so drift of the
machine affects all equally. A quarter of an hour on one thread, most of it for dense weights.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parasparse as ps
from benchmarks.timing import QUICK, elapsed, threads, write_content

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from data import mnist

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """A network, and how it is trained."""

    sizes: tuple[int, ...]
    pruned: tuple[str, ...]  # weights
    sparsities: tuple[float, ...]
    batch: int
    epochs: int
    seeds: tuple[int, ...]


SETTINGS = {
    "LeNet-300-100": Setting((784, 300, 100, 10), ("0.weight", "2.weight", "4.weight"), (0.95,),
                             batch=100, epochs=10, seeds=(0, 1, 2)),
    "MLP 784-4096-4096-10": Setting((784, 4096, 4096, 10), ("0.weight", "2.weight"), (0.95, 0.98),
                                    batch=128, epochs=1, seeds=(0,)),
}  # fmt: skip


class Trained:
    """A network and its optimizer, and the milliseconds that its steps took."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ms = model, 0.0
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(self, x: Tensor, y: Tensor) -> None:
        def run() -> None:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

        self.ms += elapsed(run)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        parts = zip(x.split(1000), y.split(1000), strict=True)
        right = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in parts)
        return right / len(y)


def networks(setting: Setting, seed: int) -> dict[tuple[str, str], Trained]:
    """Return the networks of a seed by their zeros and kind of weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(setting.sizes, setting.sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    dense = nn.Sequential(*layers[:-1])
    found = {("0%", "dense"): Trained(dense)}
    for sparsity in setting.sparsities:
        rule = ps.Prune(sparsity, score=ps.scores.random)
        masked = ps.sparsify(copy.deepcopy(dense), dict.fromkeys(setting.pruned, rule))
        found[f"{sparsity:.0%}", "masked"] = Trained(masked)
        found[f"{sparsity:.0%}", "compact"] = Trained(ps.compact(copy.deepcopy(masked)))
    return found


def train(setting: Setting, seed: int, data: Data) -> dict[tuple[str, str], Trained]:
    """Train the networks of a seed, step by step in turn."""
    found = networks(setting, seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    for _ in range(setting.epochs):
        batches = torch.randperm(len(x), generator=generator).split(setting.batch)
        for batch in batches[:3] if QUICK else batches:
            for trained in found.values():
                trained.step(x[batch], y[batch])
    return found


def rows(name: str, setting: Setting, training: Data, test: Data) -> list[dict[str, object]]:
    """Return a row for each kind of network."""
    runs = [train(setting, seed, training) for seed in setting.seeds]
    shown = asdict(setting)
    about = {"network": name, **{key: shown[key] for key in ("batch", "epochs", "seeds")}}
    found = []
    for zeros, weights in runs[0]:
        own = [run[zeros, weights] for run in runs]
        accuracies = [round(trained.accuracy(*test), 4) for trained in own]
        seconds = sum(trained.ms for trained in own) / 1e3 / len(own) / setting.epochs
        found.append({**about, "zeros": zeros, "weights": weights, "accuracies": accuracies,
                      "seconds per epoch": round(seconds, 2)})  # fmt: skip
        print(found[-1], flush=True)
    return found


def main(folder: Path) -> None:
    sets = mnist(folder)
    training, test = ((images.flatten(1), labels) for images, labels in (s.tensors for s in sets))
    with threads(1):
        found = [
            row for name, setting in SETTINGS.items() for row in rows(name, setting, training, test)
        ]
    write_content("mnist_compact", {"rows": found})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
