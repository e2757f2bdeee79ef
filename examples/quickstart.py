"""Sparsify a torchvision ResNet-18 to 90 %, fine-tune it, fold the masks, export it.

The data are scikit-learn's handwritten digits, 1,797 images of 8 x 8, which ship with the package.
Takes about a minute on two cores. Writes `out/sparsity.png` and `out/resnet18.pt2`.
"""

import copy
import time
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


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=0.25, random_state=0, stratify=y)
    return TensorDataset(x[train], y[train]), x[test], y[test]


def small_resnet() -> nn.Module:
    """ResNet-18 for one channel of 8 x 8: a stem of stride 1, no pooling after it."""
    model = resnet18(weights=None, num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float, what: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    model.train()
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        seconds = time.perf_counter() - start
        print(
            f"  {what}: epoch {epoch + 1}/{epochs}, loss {total / len(data):.3f}, {seconds:.1f} s",
            flush=True,
        )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def picture(table: "ps.report.Summary", path: Path) -> None:
    names = [row.name for row in table.rows]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.barh(names, [row.sparsity for row in table.rows], color="#4477aa")
    axes.axvline(table.masked.sparsity, color="#cc3311", label="all masked tensors")
    axes.invert_yaxis()
    axes.set(xlabel="sparsity", xlim=(0, 1), title="ResNet-18 at 90 % by global magnitude")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.manual_seed(0)
    OUT.mkdir(exist_ok=True)
    data, x, y = digits()
    model = small_resnet()

    print("1. train the dense network")
    train(model, data, epochs=4, lr=0.02, what="dense")
    dense = accuracy(model, x, y)

    print("2. sparsify: 90 % of all weights by global magnitude, the classifier stays dense")
    ps.sparsify(model, {"fc": None, "*": ps.Prune(0.9, scope="global")})
    sparse = accuracy(model, x, y)

    print("3. fine-tune with the masks in place")
    train(model, data, epochs=3, lr=0.01, what="sparse")
    tuned = accuracy(model, x, y)
    table = ps.summary(model)
    print(table)
    picture(table, OUT / "sparsity.png")

    print("4. squash and export")
    with torch.no_grad():
        before = model(x)
        squashed = ps.squash(copy.deepcopy(model))
        after = squashed(x)
        batch = torch.export.Dim("batch")
        program = torch.export.export(squashed, (x,), dynamic_shapes=({0: batch},))
        torch.export.save(program, OUT / "resnet18.pt2")
        exported = torch.export.load(OUT / "resnet18.pt2").module()(x)
    zeros = sum(int((p == 0).sum()) for p in squashed.parameters())
    total = sum(p.numel() for p in squashed.parameters())
    print(f"  modules are plain again: {type(squashed.conv1).__name__}")
    print(f"  zeros in the parameters: {zeros:,} of {total:,}")
    print(f"  squashed output equals masked output bit for bit: {torch.equal(before, after)}")
    print(f"  largest difference of the exported program: {(exported - after).abs().max():.1e}")

    print(f"accuracy: dense {dense:.1%}, sparse {sparse:.1%}, fine-tuned {tuned:.1%}")
    print(f"written: {OUT / 'sparsity.png'}, {OUT / 'resnet18.pt2'}")


if __name__ == "__main__":
    main()
