"""What several families need: checked shapes, and TensorFlow's 'same' padding made explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from thrifty.errors import KnobError


def check(
    family: str, shape: Sequence[int], axes: Sequence[int], least: Mapping[str, float]
) -> tuple[int, ...]:
    """Return the input shape as a tuple; raises KnobError when it has other axes or an option is too
    small.

    axes: the numbers of axes that the family takes, channels included. least: option and value, which must be
    >= 1.
    """
    bad = []
    if len(shape) not in axes or min(shape, default=0) < 1:
        wanted = " or ".join({1: "(features,)", 2: "(C, L)", 3: "(C, H, W)"}[n] for n in axes)
        bad.append(f"input_shape is {tuple(shape)}; it must be {wanted}, without the batch axis")
    bad += [f"{name} is {value}; it must be at least 1" for name, value in least.items() if value < 1]
    if bad:
        raise KnobError(f"{family}: " + "; ".join(bad))
    return tuple(shape)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after an axis with which its output is ceil(size / stride) long.

    This is what TensorFlow calls 'SAME': an odd remainder goes behind.

    >>> same_padding(49, 10, 2), same_padding(32, 3, 2), same_padding(32, 3, 1)
    ((4, 5), (0, 1), (1, 1))
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_conv(
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    stride: int,
    size: tuple[int, int],
    groups: int = 1,
    bias: bool = False,
) -> nn.Sequential:
    """Return a 2-D convolution with 'same' padding for maps of (H, W) = size; the padding is its own
    layer only when it is not the same on both sides.
    """
    top, bottom = same_padding(size[0], kernel[0], stride)
    left, right = same_padding(size[1], kernel[1], stride)
    even = top == bottom and left == right
    padding = (top, left) if even else 0
    conv = nn.Conv2d(channels, filters, kernel, stride, padding, groups=groups, bias=bias)
    return nn.Sequential(conv) if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def halved(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the (H, W) of a map after a 'same' convolution.

    >>> halved((49, 10), 2)
    (25, 5)
    """
    return -(-size[0] // stride), -(-size[1] // stride)
