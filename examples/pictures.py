"""Train two small networks on digits, and draw the pictures of the documentation.

    python examples/pictures.py [FOLDER]

writes sparsity.png, masks.png, scores.png and history.png. scikit-learn has the digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import parasparse as ps

Controller = ps.GradualPruning | ps.DynamicSparsity


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1,797 images of 8 x 8 pixels as rows, and their labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def train(kind: str) -> tuple[nn.Module, Controller, dict[int, float]]:
    """Return a sparse network, its controller, and the accuracy on 297 test images by step."""
    torch.manual_seed(0)
    x, y = digits()
    x, y, test_x, test_y = x[:1500], y[:1500], x[1500:], y[1500:]
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    controller: Controller
    if kind == "dynamic":
        controller = ps.sparse_momentum(model, 0.95, optimizer, stop=600, every=25)
    else:
        schedule = ps.schedules.Cubic(0.0, 1.0, start=100, stop=500)
        rules = ps.Prune(0.95, scope="global")
        controller = ps.GradualPruning(model, rules, optimizer, schedule=schedule, every=25)
    accuracy = {}
    for step in range(1, 601):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        controller.step()
        if step % 25 == 0:
            with torch.no_grad():
                accuracy[step] = float((model(test_x).argmax(1) == test_y).float().mean())
    print(f"{kind}: accuracy {accuracy[600]:.3f}, {controller.history[-1].total:.1%} zeros")
    return model, controller, accuracy


def main(arguments: list[str]) -> None:
    """Draw everything into the folder that `arguments` name."""
    folder = Path(arguments[0] if arguments else "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    pruned, _, _ = train("gradual")
    model, controller, accuracy = train("dynamic")
    pictures = {
        "sparsity": ps.plot(pruned),
        "scores": ps.plot(pruned, kind="scores"),
        "masks": ps.plot(model, kind="masks"),
        "history": ps.plot(controller, accuracy=accuracy),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
