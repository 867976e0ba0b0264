"""Small random networks with sums, concatenations, depthwise and grouped layers, for property tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def shake(model: nn.Module) -> nn.Module:
    """Give batch norms statistics of their own."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    return model.eval()


class Random(nn.Module):
    """Blocks chosen by a list of letters."""

    def __init__(self, letters: str, width: int, one_d: bool, flat: bool) -> None:
        super().__init__()
        conv = nn.Conv1d if one_d else nn.Conv2d
        norm = nn.BatchNorm1d if one_d else nn.BatchNorm2d
        self.letters, self.flat, self.one_d = letters, flat, one_d
        self.stem = nn.Sequential(conv(3, width, 3, padding=1), norm(width), nn.ReLU())
        c = width
        for i, letter in enumerate(letters):
            wide = width + 2 * i
            parts = {
                "c": lambda c, w: nn.Sequential(conv(c, w, 3, padding=1, bias=False), norm(w), nn.ReLU6()),
                "r": lambda c, w: nn.Sequential(conv(c, c, 3, padding=1), norm(c)),
                "s": lambda c, w: nn.Sequential(conv(c, w, 1), norm(w), nn.Hardswish()),
                "d": lambda c, w: nn.Sequential(conv(c, c, 3, padding=1, groups=c), norm(c), conv(c, w, 1)),
                "m": lambda c, w: nn.Sequential(conv(c, 2 * c, 3, groups=c, padding=1), conv(2 * c, w, 1)),
                "g": lambda c, w: nn.Sequential(conv(c, 2 * w, 3, padding=1, groups=2), conv(2 * w, w, 1)),
                "p": lambda c, w: nn.MaxPool1d(2) if one_d else nn.MaxPool2d(2),
                "k": lambda c, w: conv(c, w, 3, padding=1),
            }  # fmt: skip
            self.add_module(f"b{i}", parts[letter](c, wide))
            c = {"c": wide, "s": c + wide, "d": wide, "m": wide, "g": wide, "k": wide}.get(letter, c)
            if letter == "k":
                self.add_module(f"k{i}", conv(c, c, 1))
        size = 8 // 2 ** letters.count("p")
        self.out = nn.Linear(c * (size if one_d else size * size) if flat else c, 2)

    def forward(self, x):
        x = self.stem(x)
        for i, letter in enumerate(self.letters):
            y = getattr(self, f"b{i}")(x)
            if letter == "r":
                y = F.relu(x + y)
            elif letter == "s":
                y = torch.cat([y, x], 1)
            elif letter == "k":
                y = getattr(self, f"k{i}")(F.relu(y)) + y
            x = y
        return self.out(x.flatten(1) if self.flat else x.mean((2,) if self.one_d else (2, 3)))
