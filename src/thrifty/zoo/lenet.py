"""LeNet for digits: LeNet-5 of LeCun et al. 1998, with ReLU and max pooling, and a smaller one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from thrifty.errors import KnobError
from thrifty.zoo.layers import check


class LeNet(nn.Module):
    """Two convolutions with pooling, then linear layers.

    Pictures of 20 pixels and more get 5x5 convolutions of 6 and 16 filters (the second without padding) and
    layers of 120 and 84; smaller ones (the 8x8 digits) get 3x3 convolutions of 8 and 16 filters and one layer
    of 32. batch_norm: after each convolution.
    """

    def __init__(
        self, input_shape: Sequence[int] = (1, 8, 8), classes: int = 10, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.input_shape = check("lenet", input_shape, (3,), {"classes": classes})
        channels, height, width = self.input_shape
        if min(height, width) < 4:
            raise KnobError(f"lenet: input_shape is {self.input_shape}; pictures need at least 4x4 pixels")
        large = min(height, width) >= 20
        kernel, filters, widths = (5, (6, 16), (120, 84)) if large else (3, (8, 16), (32,))
        layers: list[nn.Module] = []
        for i, count in enumerate(filters):
            padding = 0 if large and i else kernel // 2
            layers.append(nn.Conv2d(channels, count, kernel, padding=padding, bias=not batch_norm))
            layers += [nn.BatchNorm2d(count)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels = count
        self.features = nn.Sequential(*layers, nn.Flatten())
        lost = 4 if large else 0  # by the convolution without padding
        inputs = channels * ((height // 2 - lost) // 2) * ((width // 2 - lost) // 2)
        head: list[nn.Module] = []
        for count in widths:
            head += [nn.Linear(inputs, count), nn.ReLU()]
            inputs = count
        self.head = nn.Sequential(*head, nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, (n, classes)."""
        scores: Tensor = self.head(self.features(x))
        return scores
