"""ResNet-8, MLPerf Tiny's image classifier (Banbury et al. 2021, arXiv 2106.07597; ResNetv1 of He et al.
2015).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.zoo.layers import check, halved, same_conv


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation; the shortcut is a 1x1 convolution where the shape
    changes.
    """

    def __init__(self, channels: int, filters: int, stride: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = same_conv(channels, filters, (3, 3), stride, size)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = same_conv(filters, filters, (3, 3), 1, halved(size, stride))
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == filters
            else same_conv(channels, filters, (1, 1), stride, size, bias=True)
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, (n, filters, H / stride, W / stride)."""
        branch = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu(branch + self.shortcut(x))
        return out


class ResNet8(nn.Module):
    """A convolution, three residual blocks of 1, 2 and 4 times the filters, average pooling, a classifier.

    The defaults are the benchmark's reference: 32x32 colour, 16 filters, ten classes, 12 501 632 MACs.
    """

    def __init__(
        self, input_shape: Sequence[int] = (3, 32, 32), classes: int = 10, filters: int = 16
    ) -> None:
        super().__init__()
        self.input_shape = check("resnet-8", input_shape, (3,), {"classes": classes, "filters": filters})
        channels, height, width = self.input_shape
        size = (height, width)
        self.conv1 = same_conv(channels, filters, (3, 3), 1, size)
        self.norm1 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU()
        self.block1 = Block(filters, filters, 1, size)
        self.block2 = Block(filters, 2 * filters, 2, size)
        size = halved(size, 2)
        self.block3 = Block(2 * filters, 4 * filters, 2, size)
        self.pool = nn.AvgPool2d(halved(size, 2))
        self.head = nn.Linear(4 * filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        scores: Tensor = self.head(self.pool(x).flatten(1))
        return scores
