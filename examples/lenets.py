"""The two networks that papers on sparse training try on MNIST."""

from collections.abc import Callable

from torch import nn


def lenet300() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip


def lenet5() -> nn.Module:
    """Caffe's LeNet-5: 430,500 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"lenet300-100": lenet300, "lenet5": lenet5}
