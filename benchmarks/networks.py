"""Modules that several benchmarks use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import parasparse as ps


class Where(nn.Module):
    """The usual parametrization for a bool mask: `torch.where`."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0.0)


class Recurrent(nn.Module):
    """A two-layer LSTM and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(256, 512, num_layers=2, batch_first=True)
        self.head = nn.Linear(512, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def for_inference(model: nn.Module, x: Tensor) -> nn.Module:
    """Accelerate as docs/payoff.md says: fused, and with the compiled kernel."""
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model = ps.fuse(model)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    zeros = any(2 * weight.count_nonzero() <= weight.numel() for weight in weights)
    return ps.accelerate(model, x, compile_kernel=True) if zeros else model


class Logits(nn.Module):
    """A model of transformers that takes token numbers and returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens)[0]


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return Logits(BertModel(BertConfig(), add_pooling_layer=False))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> Tensor:
    return torch.randint(1000, (batch, 128))
