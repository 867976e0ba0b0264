"""MobileNetV1, MLPerf Tiny's visual wake words (Howard et al. 2017, arXiv 1704.04861; Banbury et al.
2021).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.errors import KnobError
from thrifty.zoo.layers import check, halved, same_conv

# Table 1 of the source: filters at width 1 and stride, of the first convolution and the 13 separable blocks.
PLAN = (
    *((32, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *[(512, 1)] * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """A convolution, thirteen separable blocks, global average pooling, a classifier.

    The defaults are the benchmark's reference: 96x96 colour, width 0.25, two classes, 7 489 664 MACs.
    width: multiplies every number of filters.
    """

    def __init__(
        self, input_shape: Sequence[int] = (3, 96, 96), classes: int = 2, width: float = 0.25
    ) -> None:
        super().__init__()
        self.input_shape = check("mobilenet-v1", input_shape, (3,), {"classes": classes})
        if not width > 0:
            raise KnobError(f"mobilenet-v1: width is {width}; it must be positive")
        channels, size = self.input_shape[0], (self.input_shape[1], self.input_shape[2])
        layers: list[nn.Module] = []
        for i, (filters, stride) in enumerate(PLAN):
            filters = max(1, round(filters * width))
            if i:
                layers += [
                    *same_conv(channels, channels, (3, 3), stride, size, groups=channels),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, filters, 1, bias=False),
                ]
            else:
                layers += same_conv(channels, filters, (3, 3), stride, size)
            layers += [nn.BatchNorm2d(filters), nn.ReLU()]
            channels, size = filters, halved(size, stride)
        self.features = nn.Sequential(*layers, nn.AvgPool2d(size))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        scores: Tensor = self.head(self.features(x).flatten(1))
        return scores
