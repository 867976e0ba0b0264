"""Random PyTorch networks with data to match: residual sums, concatenations, strides, groups, batch norms, heads."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from thrifty.task import Task


class RandomNet(nn.Module):
    """Up to `layers` random operators on maps, then a pool and a linear head. Equal seeds give equal networks."""

    def __init__(self, seed: int, layers: int = 5) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.flat = bool(rng.random() < 0.35)  # 1-D
        space = (int(rng.integers(6, 14)),) if self.flat else tuple(int(s) for s in rng.integers(5, 11, 2))
        self.input_shape = (int(rng.integers(1, 6)), *space)
        self.classes = int(rng.integers(2, 6))
        self.steps: list[tuple[str, int]] = []
        self.layers = nn.ModuleList()
        shapes = [self.input_shape]
        x = torch.zeros(2, *self.input_shape)
        maps = [x]
        for _ in range(int(rng.integers(2, layers + 1))):
            self._add(rng, maps, shapes)
        self.head_pool = str(rng.choice(["mean", "max", "flatten"]))
        features = maps[-1].flatten(1).shape[1] if self.head_pool == "flatten" else maps[-1].shape[1]
        self.head = nn.Linear(features, self.classes)
        self.softmax = bool(rng.random() < 0.15)
        self.eval()
        self._settle()

    def _add(self, rng: np.random.Generator, maps: list[torch.Tensor], shapes: list[tuple[int, ...]]) -> None:
        x = maps[-1]
        kind = str(
            rng.choice(
                [
                    "conv",
                    "conv",
                    "block",
                    "block",
                    "depthwise",
                    "grouped",
                    "pool",
                    "residual",
                    "concat",
                    "act",
                ]
            )
        )
        channels = x.shape[1]
        if kind == "residual":
            layer, other = self._conv(rng, channels, channels, 3, 1, 1), len(maps) - 1
        elif kind == "concat":
            layer, other = self._conv(rng, channels, int(rng.integers(1, 9)), 1, 1, 1), len(maps) - 1
        else:
            layer, other = self._plain(rng, kind, channels, min(x.shape[2:])), -1
        y = layer(x)
        if kind == "residual":
            y = y + maps[other]
        elif kind == "concat":
            y = torch.cat([y, maps[other]], 1)
        if min(y.shape[2:]) < 1:
            return
        self.layers.append(layer)
        self.steps.append((kind, other))
        maps.append(y)
        shapes.append(tuple(y.shape[1:]))

    def _plain(self, rng: np.random.Generator, kind: str, channels: int, smallest: int) -> nn.Module:
        width = int(rng.choice([1, 2, 3, 4, 5, 8, 12, 16]))
        stride = int(rng.choice([1, 1, 2]))
        kernel = int(rng.choice([1, 2, 3, 5]))
        if kind == "depthwise":
            return self._conv(rng, channels, channels, 3, stride, channels)
        if kind == "grouped":
            groups = max(g for g in (1, 2, 3, 4) if channels % g == 0)
            return self._conv(rng, channels, groups * max(1, width // groups), 3, stride, groups)
        if kind == "pool":
            size = min(smallest, int(rng.choice([2, 3])))
            family = [nn.MaxPool1d, nn.AvgPool1d] if self.flat else [nn.MaxPool2d, nn.AvgPool2d]
            return family[int(rng.integers(2))](size, int(rng.integers(1, size + 1)))
        if kind == "act":
            return [nn.ReLU(), nn.ReLU6(), nn.Hardswish()][int(rng.integers(3))]
        conv = self._conv(rng, channels, width, kernel, stride, 1)
        if kind == "conv":
            return conv
        norm = (nn.BatchNorm1d if self.flat else nn.BatchNorm2d)(width)
        return nn.Sequential(conv, norm, [nn.ReLU(), nn.ReLU6()][int(rng.integers(2))])

    def _conv(self, rng: np.random.Generator, cin: int, cout: int, kernel: int, stride: int, groups: int) -> nn.Module:
        make = nn.Conv1d if self.flat else nn.Conv2d
        return make(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bool(rng.random() < 0.7))

    def _settle(self) -> None:
        """Give batch norms the statistics of random data."""
        norms = [m for m in self.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            self(torch.randn(32, *self.input_shape))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for layer, (kind, other) in zip(self.layers, self.steps):
            y = layer(maps[-1])
            if kind == "residual":
                y = y + maps[other]
            elif kind == "concat":
                y = torch.cat([y, maps[other]], 1)
            maps.append(y)
        x = maps[-1]
        space = tuple(range(2, x.ndim))
        x = x.mean(space) if self.head_pool == "mean" else x.amax(space) if self.head_pool == "max" else x.flatten(1)
        x = self.head(x)
        return torch.softmax(x, 1) if self.softmax else x


def random_task(model: RandomNet, n: int = 48, seed: int = 0) -> Task:
    """Return noise with random labels: enough for ranges and for parity."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (n, *model.input_shape)).astype(np.float32)
    y = np.arange(n) % model.classes
    return Task.from_arrays(x, y, seed=seed, validation=0.25, test=0.25, name="noise")
