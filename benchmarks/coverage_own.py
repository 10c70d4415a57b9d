"""Nets of coverage.toml that no library has as such: a U-Net and a tagger of two LSTM layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[Any]


def _double(source: int, made: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(source, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU(),
        nn.Conv2d(made, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Encoder, decoder and the connections between them (Ronneberger et al. 2015, arXiv:1505.04597)."""

    def __init__(self, *, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2 = _double(3, width), _double(width, 2 * width)
        self.bottom = _double(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.turn2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.turn1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up2, self.up1 = _double(4 * width, 2 * width), _double(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Any) -> Any:
        """(batch, 3, side, side) to (batch, classes, side, side)."""
        first = self.down1(images)
        second = self.down2(self.pool(first))
        bottom = self.bottom(self.pool(second))
        second = self.up2(torch.cat([second, self.turn2(bottom)], 1))
        return self.head(self.up1(torch.cat([first, self.turn1(second)], 1)))


class Tagger(nn.Module):
    """Two bidirectional-free LSTM layers over frames and a linear layer for each."""

    def __init__(self, *, features: int = 40, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.features = features
        self.first = nn.LSTM(features, hidden, batch_first=True)
        self.second = nn.LSTM(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, frames: Any) -> Any:
        """(batch, length, features) to (batch, length, classes)."""
        return self.head(self.second(self.first(frames)[0])[0])

    def example(self, random: np.random.Generator, batch: int) -> dict[str, Array]:
        """Frames of 20 steps."""
        return {"frames": random.standard_normal((batch, 20, self.features)).astype(np.float32)}
