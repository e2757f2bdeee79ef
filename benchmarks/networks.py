"""Modules that several benchmarks use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
