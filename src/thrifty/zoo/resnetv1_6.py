"""ResNetv1-6, the network that MicroAI trains on every data set (Novac et al. 2021, arXiv 2105.13331)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.zoo.layers import check


class ResNetV16(nn.Module):
    """Six layers: a convolution, two residual blocks, global max pooling, a classifier.

    The stride of the first block is a max pooling after a convolution of stride 1, in both branches. One
    width for all layers; 13 F^2 + 39 F + 6 parameters for UCI-HAR without batch normalisation.

    input_shape: (C, L) makes a 1-D network, (C, H, W) a 2-D one. batch_norm: after every convolution (the
    source has the option and does not use it).
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (9, 128),
        classes: int = 6,
        filters: int = 16,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = check("resnetv1-6", input_shape, (2, 3), {"classes": classes, "filters": filters})
        flat = len(self.input_shape) == 2
        pool: type[nn.Module] = nn.MaxPool1d if flat else nn.MaxPool2d

        def conv(channels: int, kernel: int) -> nn.Sequential:
            layer = (nn.Conv1d if flat else nn.Conv2d)(
                channels, filters, kernel, padding=kernel // 2, bias=not batch_norm
            )
            norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(filters) if batch_norm else None
            return nn.Sequential(layer) if norm is None else nn.Sequential(layer, norm)

        self.conv1 = conv(self.input_shape[0], 3)
        self.block1_conv1 = conv(filters, 3)
        self.block1_pool = pool(2)
        self.block1_conv2 = conv(filters, 3)
        self.block1_shortcut = conv(filters, 1)
        self.block1_shortcut_pool = pool(2)
        self.block2_conv1 = conv(filters, 3)
        self.block2_conv2 = conv(filters, 3)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveMaxPool1d(1) if flat else nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        x = self.relu(self.conv1(x))
        branch = self.relu(self.block1_pool(self.block1_conv1(x)))
        shortcut = self.block1_shortcut_pool(self.block1_shortcut(x))
        x = self.relu(self.block1_conv2(branch) + shortcut)
        x = self.relu(self.block2_conv2(self.relu(self.block2_conv1(x))) + x)
        scores: Tensor = self.head(self.pool(x).flatten(1))
        return scores
