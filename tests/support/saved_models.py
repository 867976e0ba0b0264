"""The models behind the saved models of tests/fixtures. `python saved_models.py FOLDER` makes them again.

Every schema of the manifest keeps its folder for ever; a new schema gets new folders.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from thrifty.compress import Lossless, Prune, Quantize, compress
from thrifty.recipe import Recipe
from thrifty.store import save
from thrifty.task import Task


class SavedNet(nn.Module):
    """A convolution, batch normalisation, a linear layer of low rank."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.hidden = nn.Linear(72, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x).flatten(1)).relu())


def saved_net() -> SavedNet:
    """Return a net with fixed weights; `hidden` has rank 4."""
    generator = torch.Generator().manual_seed(0)
    net = SavedNet()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        net.features[1].weight.abs_()
        left, right = (torch.randn(*s, generator=generator) * 0.3 for s in ((24, 4), (4, 72)))
        net.hidden.weight.copy_(left @ right)
    return net.eval()


def small_task() -> Task:
    """Return 60 random pictures of three classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 1, 8, 8, generator=generator)
    return Task.from_arrays(x.numpy(), [i % 3 for i in range(60)], seed=0, classes=("a", "b", "c"))


RECIPES = {
    "low_rank": Recipe((Lossless(),)),
    "pruned_int8": Recipe((Prune(0.5, recover_epochs=0), Quantize(bits=8))),
}


def probe() -> Tensor:
    """Return the inputs whose outputs the fixtures keep."""
    return torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)


def main(folder: Path) -> None:
    """Write the models and their outputs."""
    for name, recipe in RECIPES.items():
        model = compress(saved_net(), recipe, small_task())
        save(model, folder / name, "saved_models:SavedNet")
        outputs = [[float(v) for v in row] for row in model(probe()).detach()]
        (folder / f"{name}_outputs.json").write_text(json.dumps(outputs) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
