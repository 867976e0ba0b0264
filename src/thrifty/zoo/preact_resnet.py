"""PreActResNet-18 for 32x32 pictures (He et al. 2016, Identity mappings, arXiv 1603.05027)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.zoo.layers import check


class PreActBlock(nn.Module):
    """Batch normalisation and ReLU before each of two 3x3 convolutions; the shortcut starts after the
    first ReLU where the shape changes.
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut = None
        if stride != 1 or channels != filters:
            self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, (n, filters, H / stride, W / stride)."""
        active = self.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.relu(self.norm2(self.conv1(active)))) + shortcut
        return out


class PreActResNet18(nn.Module):
    """A convolution, four groups of two blocks of 1, 2, 4 and 8 times the filters, a classifier."""

    def __init__(
        self, input_shape: Sequence[int] = (3, 32, 32), classes: int = 10, filters: int = 64
    ) -> None:
        super().__init__()
        limits = {"classes": classes, "filters": filters}
        self.input_shape = check("preact-resnet-18", input_shape, (3,), limits)
        self.conv1 = nn.Conv2d(self.input_shape[0], filters, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        channels = filters
        for group in range(4):
            width = filters * 2**group
            blocks += [PreActBlock(channels, width, 2 if group else 1), PreActBlock(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        x = self.relu(self.norm(self.blocks(self.conv1(x))))
        scores: Tensor = self.head(self.pool(x).flatten(1))
        return scores
