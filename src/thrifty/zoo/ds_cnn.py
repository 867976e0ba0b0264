"""DS-CNN, MLPerf Tiny's keyword spotter (Zhang et al. 2017, Hello Edge, arXiv 1711.07128; Banbury et al.
2021).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.zoo.layers import check, halved, same_conv


class DSCNN(nn.Module):
    """A 10x4 convolution of stride 2, four separable blocks, average pooling, a classifier.

    The defaults are the benchmark's reference: 49 frames x 10 coefficients, 12 classes, 2 656 768 MACs.
    dropout: shares before and after the separable blocks, as in the reference.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 49, 10),
        classes: int = 12,
        filters: int = 64,
        blocks: int = 4,
        dropout: tuple[float, float] = (0.2, 0.4),
    ) -> None:
        super().__init__()
        limits = {"classes": classes, "filters": filters, "blocks": blocks}
        self.input_shape = check("ds-cnn", input_shape, (3,), limits)
        channels, height, width = self.input_shape
        size = halved((height, width), 2)
        layers: list[nn.Module] = [
            *same_conv(channels, filters, (10, 4), 2, (height, width)),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Dropout(dropout[0]),
        ]
        for _ in range(blocks):
            layers += [
                *same_conv(filters, filters, (3, 3), 1, size, groups=filters),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
                nn.Conv2d(filters, filters, 1, bias=False),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.Dropout(dropout[1]), nn.AvgPool2d(size))
        self.head = nn.Linear(filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        scores: Tensor = self.head(self.features(x).flatten(1))
        return scores
