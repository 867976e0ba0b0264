"""A small network with something for every technique, and data that it can learn."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from thrifty.task import Task


class SmallNet(nn.Module):
    """Two convolutions with batch norms, a residual sum and a linear head. `spare` adds what Lossless removes."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.mix = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        if spare:
            self._duplicate()

    def _duplicate(self) -> None:
        """Make two filters of the stem equal and one dead."""
        with torch.no_grad():
            conv, norm = self.stem[0], self.stem[1]
            conv.weight[1], conv.bias[1] = conv.weight[0], conv.bias[0]
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor[1] = tensor[0]
            norm.weight[2], norm.bias[2] = 0.0, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.stem(x))
        x = torch.relu(self.mix(x) + x)
        return self.head(x.mean((2, 3)))


class TinyNet(nn.Module):
    """Two convolutions and a linear head: the fewest parts that a search can do something with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))

    def _duplicate(self) -> None:
        """Make two filters equal and one dead."""
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias):
                tensor[1], tensor[2] = tensor[0], 0.0


def small_task(n: int = 400, seed: int = 0) -> Task:
    """Four directions of stripes with noise, 1 x 8 x 8."""
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:8, :8]
    stripes = np.stack([np.sin(i), np.sin(j), np.sin(i + j), np.sin(i - j)]).astype(np.float32)
    y = np.arange(n) % 4
    x = stripes[y][:, None] + rng.normal(0, 0.6, (n, 1, 8, 8)).astype(np.float32)
    return Task.from_arrays(x, y, validation=0.25, test=0.25, seed=seed, name="stripes")


def trained(spare: bool = False, epochs: int = 5, kind: type[nn.Module] = SmallNet) -> nn.Module:
    """Return a network that knows the stripes; with `spare`, its duplicates are made afterwards."""
    torch.manual_seed(0)
    model = kind()
    small_task().fit(model, epochs=epochs, lr=0.05, batch=16)
    if spare:
        model._duplicate()
    return model.eval()
