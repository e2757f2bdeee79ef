"""Sparsify a torchvision ResNet-18 to 90 %, fine-tune it, fold the masks, export it.

    python examples/quickstart.py [--seed 0]

The data are scikit-learn's handwritten digits, 1,797 images of 8 x 8, which ship with the package.
Takes some 20 seconds on two cores. Writes `out/sparsity.png`, `out/resnet18.packed` and
`out/resnet18.pt2`.
"""

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import parasparse as ps

mpl.use("Agg")  # pictures go to files: no screen is needed
from matplotlib import pyplot as plt

OUT = Path("out")


@dataclass(frozen=True)
class Reached:
    """A network and its accuracy before, just after, and some epochs after it was pruned."""

    dense_model: nn.Module
    model: nn.Module
    dense: float
    pruned: float
    fine_tuned: float


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=0.25, random_state=0, stratify=y)
    return TensorDataset(x[train], y[train]), x[test], y[test]


def small_resnet() -> nn.Module:
    """ResNet-18 for one channel of 8 x 8: a smaller stem, and three of its four stages."""
    model = resnet18(weights=None)
    model.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 10)
    return model


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float, what: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    # The last batch would have 3 images: too few for BatchNorm.
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model.train()
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds, mean = time.perf_counter() - start, total / len(loader)
        print(f"  {what}: epoch {epoch + 1}/{epochs}, loss {mean:.3f}, {seconds:.1f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def recipe(seed: int) -> Reached:
    """Train, prune, fine-tune."""
    torch.manual_seed(seed)
    data, x, y = digits()
    model = small_resnet()

    print("1. train the dense network")
    train(model, data, epochs=5, lr=0.02, what="dense")
    dense_model, dense = copy.deepcopy(model), accuracy(model, x, y)

    print("2. sparsify: 90 % of all weights by global magnitude, the classifier stays dense")
    ps.sparsify(model, {"fc": None, "*": ps.Prune(0.9, scope="global")})
    pruned = accuracy(model, x, y)

    print("3. fine-tune with the masks in place")
    train(model, data, epochs=2, lr=0.01, what="sparse")
    return Reached(dense_model, model, dense, pruned, accuracy(model, x, y))


def picture(table: "ps.report.Summary", path: Path) -> None:
    names = [row.name for row in table.rows]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.barh(names, [row.sparsity for row in table.rows], color="#4477aa")
    axes.axvline(table.masked.sparsity, color="#cc3311", label="all masked tensors")
    axes.invert_yaxis()
    axes.set(xlabel="sparsity", xlim=(0, 1), title="ResNet-18 at 90 % by global magnitude")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def milliseconds(models: dict[str, nn.Module], x: Tensor, repeats: int = 30) -> dict[str, float]:
    """Return the median time of one call of each, by turns so that they meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    OUT.mkdir(exist_ok=True)
    reached = recipe(seed)
    model, (_, x, _) = reached.model, digits()
    table = ps.summary(model)
    print(table)
    picture(table, OUT / "sparsity.png")

    print("4. squash, save and export")
    with torch.no_grad():
        before = model(x)
        ps.squash(model)
        after = model(x)
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        torch.export.save(program, OUT / "resnet18.pt2")
        exported = torch.export.load(OUT / "resnet18.pt2").module()(x)
    print(f"  modules are plain again: {type(model.conv1).__name__}")
    print(f"  squashed output equals masked output bit for bit: {torch.equal(before, after)}")
    print(f"  largest difference of the exported program: {(exported - after).abs().max():.1e}")

    torch.save(reached.dense_model.state_dict(), OUT / "resnet18.pt")
    ps.save(model, OUT / "resnet18.packed")
    large, small = (
        (OUT / name).stat().st_size / 1e6 for name in ("resnet18.pt", "resnet18.packed")
    )

    print("5. measure")
    torch.set_num_threads(1)
    one = x[:1]
    sparse = ps.accelerate(copy.deepcopy(model), one)
    times = milliseconds({"dense": reached.dense_model.eval(), "sparse": sparse}, one)

    print(f"\n{'':<20}{'accuracy':>10}{'file':>12}{'one image, one thread':>24}")
    megabytes, ms = f"{large:.2f} MB", f"{times['dense']:.2f} ms"
    print(f"{'dense':<20}{reached.dense:>10.1%}{megabytes:>12}{ms:>24}")
    print(f"{'90 % pruned':<20}{reached.pruned:>10.1%}")
    megabytes, ms = f"{small:.2f} MB", f"{times['sparse']:.2f} ms"
    print(f"{'and fine-tuned':<20}{reached.fine_tuned:>10.1%}{megabytes:>12}{ms:>24}")
    print(f"written: {', '.join(str(OUT / f'resnet18.{end}') for end in ('packed', 'pt2'))}, "
          f"{OUT / 'sparsity.png'}")  # fmt: skip


if __name__ == "__main__":
    main()
