"""The dense autoencoder of MLPerf Tiny's anomaly detection (Koizumi et al. 2020, DCASE task 2; Banbury et
al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from thrifty.zoo.layers import check


class AutoEncoder(nn.Module):
    """Ten linear layers, narrow in the middle, batch normalisation and ReLU after all but the last.

    The defaults are the benchmark's reference: 640 inputs, layers of 128, a middle of 8, 264 192 MACs. The
    error of the reconstruction is the anomaly's score.
    """

    def __init__(self, input_shape: Sequence[int] = (640,), hidden: int = 128, middle: int = 8) -> None:
        super().__init__()
        self.input_shape = check("autoencoder", input_shape, (1,), {"hidden": hidden, "middle": middle})
        inputs = self.input_shape[0]
        widths = [inputs, *[hidden] * 4, middle, *[hidden] * 4]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction, (n, features)."""
        out: Tensor = self.layers(x)
        return out
