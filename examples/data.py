"""Images for the examples, from files that lie on the disk or that torchvision fetches."""

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def read_idx(folder: Path, name: str) -> Tensor:
    """Return what an idx file holds: bytes in the shape that its header gives."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
            values = torch.frombuffer(bytearray(data[4 + 4 * data[3] :]), dtype=torch.uint8)
            return values.reshape(shape)
    raise SystemExit(f"{folder} must hold {name} or {name}.gz; give the folder with --data")


def mnist(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images, normalised, with their labels."""
    places = [folder, folder / "raw", folder / "MNIST" / "raw"]
    found = [place for place in places if list(place.glob("train-images-idx3-ubyte*"))]
    if not found:
        from torchvision.datasets import MNIST

        print(f"no MNIST in {folder}: torchvision fetches it", flush=True)
        MNIST(folder, download=True)
        found = places[-1:]
    sets = []
    for part in ("train", "t10k"):
        images = read_idx(found[0], f"{part}-images-idx3-ubyte").float().unsqueeze(1) / 255
        labels = read_idx(found[0], f"{part}-labels-idx1-ubyte").long()
        sets.append(TensorDataset((images - 0.1307) / 0.3081, labels))
    return sets[0], sets[1]


def cifar10(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images, normalised, with their labels."""
    from torchvision.datasets import CIFAR10

    sets = []
    for train in (True, False):
        data = CIFAR10(folder, train=train, download=not (folder / "cifar-10-batches-py").exists())
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
        images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        sets.append(TensorDataset(images, torch.tensor(data.targets)))
    return sets[0], sets[1]
