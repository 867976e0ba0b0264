"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146), any depth and width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.errors import KnobError
from thrifty.zoo.layers import check

STEM = 16  # filters of the first convolution, whatever the width


class WideBlock(nn.Module):
    """Two 3x3 convolutions; normalisation and ReLU before each (`pre`), or behind them with a ReLU after
    the sum.
    """

    def __init__(self, channels: int, filters: int, stride: int, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.norm1 = nn.BatchNorm2d(channels if pre else filters)
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        changed = stride != 1 or channels != filters
        self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False) if changed else None
        self.shortcut_norm = nn.BatchNorm2d(filters) if changed and not pre else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, (n, filters, H / stride, W / stride)."""
        out: Tensor
        if self.pre:
            active = self.relu(self.norm1(x))
            shortcut = x if self.shortcut is None else self.shortcut(active)
            out = self.conv2(self.relu(self.norm2(self.conv1(active)))) + shortcut
            return out
        shortcut = x if self.shortcut is None else self.shortcut(x)
        shortcut = shortcut if self.shortcut_norm is None else self.shortcut_norm(shortcut)
        out = self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + shortcut)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of (depth - 4) / 6 blocks of 1, 2 and 4 times 16 x width filters.

    width: may be a fraction. order: "pre" is the source's pre-activation block; "post" is the block that GKD
    trains (conv, norm, ReLU, conv, norm, sum, ReLU; Lassance et al. 2019, arXiv 1911.03080), whose outputs
    are not negative, as its graphs need.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        depth: int = 28,
        width: float = 1.0,
        order: str = "pre",
    ) -> None:
        super().__init__()
        self.input_shape = check(
            "wide-resnet", input_shape, (3,), {"classes": classes, "16 * width": STEM * width}
        )
        if depth < 10 or (depth - 4) % 6:
            raise KnobError(
                f"wide-resnet: depth is {depth}; it must be 6 n + 4 with n at least 1: 10, 16, 22, 28, ..."
            )
        if order not in ("pre", "post"):
            raise KnobError(f"wide-resnet: order is '{order}'; it must be 'pre' or 'post'")
        pre = order == "pre"
        stem: list[nn.Module] = [nn.Conv2d(self.input_shape[0], STEM, 3, 1, 1, bias=False)]
        self.stem = nn.Sequential(*stem, *([] if pre else [nn.BatchNorm2d(STEM), nn.ReLU()]))
        channels, groups = STEM, []
        for group in range(3):
            filters = round(STEM * width * 2**group)
            blocks = []
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(channels, filters, 2 if group and not block else 1, pre))
                channels = filters
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.ModuleList(groups)
        self.last = nn.Sequential(*([nn.BatchNorm2d(channels), nn.ReLU()] if pre else []))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        return self.features(x)[0]

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the scores and what the three groups give: two maps, and the pooled output of the last,
        (n, C).
        """
        x = self.stem(x)
        outputs: list[Tensor] = []
        for group in self.groups:
            x = group(x)
            outputs.append(x)
        outputs[-1] = self.pool(self.last(x)).flatten(1)
        return self.head(outputs[-1]), outputs
