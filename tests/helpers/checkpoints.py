"""Checkpoints in every format, and how they are read back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from parasparse.cli.main import main

FORMATS = ["pt", "safetensors", "folder"]


all_formats = pytest.mark.parametrize("kind", FORMATS)


class Net(nn.Module):
    """Convolutions, a normalisation, an embedding tied to its head, a pair, an integer buffer."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(8, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.layer2 = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 32))
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight
        self.weight_re = nn.Parameter(torch.randn(8, 8))
        self.weight_im = nn.Parameter(torch.randn(8, 8))
        self.narrow = nn.Parameter(torch.randn(16, 16, dtype=torch.bfloat16))
        self.register_buffer("table", torch.arange(64).view(8, 8))


def state():
    torch.manual_seed(0)
    return Net().state_dict()


def written(folder, kind, tensors, name="in"):
    """A checkpoint of `tensors`; its path."""
    if kind == "pt":
        torch.save(tensors, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    # Files of safetensors know no ties.
    copied = {key: value.clone().contiguous() for key, value in tensors.items()}
    if kind == "safetensors":
        save_file(copied, folder / f"{name}.safetensors", metadata={"format": "pt", "by": "me"})
        return folder / f"{name}.safetensors"
    place = folder / name
    place.mkdir()
    keys, weight_map = list(copied), {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({key: copied[key] for key in part}, place / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text("{}")
    return place


def loaded(path):
    if path.is_dir():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        files = {file: load_file(path / file) for file in set(index["weight_map"].values())}
        return {key: files[file][key] for key, file in index["weight_map"].items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def out_of(folder, kind, name="out"):
    return folder / (name if kind == "folder" else f"{name}.{kind}")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def check_same(one, two):
    assert list(one) == list(two) or one.keys() == two.keys()
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype
        assert torch.equal(one[name], tensor), name
