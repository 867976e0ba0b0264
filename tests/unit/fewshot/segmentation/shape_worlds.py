"""Pictures of coloured textured shapes, and an encoder of fixed filters: segmentation without downloads."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from thrifty.fewshot.segmentation import Encoder, InMemory

COLOURS = np.array([(128, 128, 128), (220, 60, 60), (60, 200, 80), (70, 90, 230)])
CLASSES = ("ground", "red", "green", "blue")


def shapes(count=12, size=48, seed=0, noise=12.0):
    """Return pictures with a striped rectangle and a disc or two, whose class is their colour."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    pictures, masks = [], []
    for i in range(count):
        mask = np.zeros((size, size), np.uint8)
        for target in (1 + i % 3, 1 + int(rng.integers(3))):
            y, x, r = *rng.integers(10, size - 10, 2), int(rng.integers(7, 12))
            disc = (rows - y) ** 2 + (columns - x) ** 2 < r**2
            square = (abs(rows - y) < r) & (abs(columns - x) < r)
            mask[disc if rng.random() < 0.5 else square] = target
        stripes = 25 * np.sin((rows * (1 + i % 2) + columns) / 2.0)[..., None]
        picture = COLOURS[mask] + stripes + rng.normal(0, noise, (size, size, 3))
        pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
        masks.append(mask)
    return InMemory(pictures, masks, CLASSES)


class Filters(Encoder):  # docs: begin
    """Colours and gradients at stride 2, smoothed colours at stride 4, through fixed random features."""

    channels, strides, multiple, lora_targets = (24, 24), (2, 4), 4, ("mix",)

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(24, 24, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.drop = nn.Dropout(0.1)
        for conv in (self.first, self.mix):
            nn.init.kaiming_normal_(conv.weight, generator=g)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        fine = F.relu(self.first(x))
        return [fine, self.drop(self.norm(F.relu(self.mix(fine))))]  # docs: end
