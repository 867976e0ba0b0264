"""What an encoder is: a network from pictures to feature maps at several depths."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import DataError, KnobError
from thrifty.fewshot.segmentation.pictures import Pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Module = TypeVar("Module", bound=nn.Module)


class Encoder(nn.Module):
    """Base class of encoders. A new one sets `channels` and `strides` and gives `forward`; the rest has defaults.

    `forward(x)` takes normalised pictures (B, 3, H, W), H and W multiples of `multiple`, and returns one map
    (B, channels[i], about H / strides[i], about W / strides[i]) for each depth, class and register tokens dropped. The
    last map is what the method "linear" uses; "multilayer" joins all of them, resized to the grid of map `joined`.
    """

    channels: tuple[int, ...]  # of the map of each depth
    strides: tuple[int, ...]  # picture pixels per cell, of each depth
    joined: int = 0  # the map whose grid "multilayer" uses
    multiple: int = 1  # the sides of the input must be multiples of this
    input_size: int | None = None  # pictures are first resized to this square; None: as they come
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels / 255
    std: tuple[float, float, float] = IMAGENET_STD
    lora_targets: tuple[str, ...] = ()  # ends of the names of the layers that LoRA changes

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps, from the first depth to the last."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x) -> list of maps")

    def input_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that pictures of this size get: `input_size` if set, then the largest multiples within it.

        Raises DataError for pictures that are smaller than one patch.
        """
        if self.input_size is not None:
            height = width = self.input_size
        fitted = (height // self.multiple * self.multiple, width // self.multiple * self.multiple)
        if min(fitted) < 1:
            raise DataError(
                f"a picture of {height}x{width} is smaller than the {self.multiple} pixels of one patch; set input_size"
            )
        return fitted

    def grid(self, height: int, width: int, multilayer: bool = False) -> tuple[int, int]:
        """Return the cells (rows, columns) of the feature map of a picture of this size: print it beside a result."""
        stride = self.strides[self.joined if multilayer else -1]
        rows, columns = self.input_shape(height, width)
        return -(-rows // stride), -(-columns // stride)

    def prepare(self, pictures: Pixels) -> Tensor:
        """Return normalised pictures (B, 3, h, w) float32, resized to `input_shape`. pictures: (B, H, W, 3) uint8."""
        x = torch.from_numpy(np.array(pictures, np.uint8)).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(self.mean).view(1, 3, 1, 1)) / torch.tensor(self.std).view(1, 3, 1, 1)
        shape = self.input_shape(*x.shape[2:])
        if shape != tuple(x.shape[2:]):
            x = F.interpolate(x, shape, mode="bilinear", align_corners=False, antialias=True)
        device: torch.device = next(self.parameters(), x).device
        return x.to(device)

    def features(self, x: Tensor, multilayer: bool) -> Tensor:
        """Return what the head sees: the last map, or all maps joined on the channels (B, sum of channels, h, w)."""
        maps: list[Tensor] = self(x)
        if len(maps) != len(self.channels) or any(m.shape[1] != c for m, c in zip(maps, self.channels)):
            got = [tuple(m.shape) for m in maps]
            raise DataError(f"{type(self).__name__} says channels {self.channels}, but forward gives maps {got}")
        if not multilayer:
            return maps[-1]
        size = maps[self.joined].shape[2:]
        return torch.cat([_resized(m, size) for m in maps], dim=1)

    def width(self, multilayer: bool) -> int:
        """Return the channels that the head sees."""
        return sum(self.channels) if multilayer else self.channels[-1]


def _resized(m: Tensor, size: Any) -> Tensor:
    return m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear", align_corners=False)


def tokens_to_map(tokens: Tensor, rows: int, columns: int, prefix: int = 1) -> Tensor:
    """Return (B, C, rows, columns): the last rows * columns tokens of (B, prefix + rows * columns, C), row by row.

    prefix: class and register tokens, dropped. Raises DataError when the count is another.

    >>> tokens_to_map(torch.arange(5.0).reshape(1, 5, 1), 2, 2)[0, 0].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    if tokens.shape[1] != prefix + rows * columns:
        raise DataError(f"{tokens.shape[1]} tokens, expected {prefix} + {rows} x {columns}")
    return tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, rows, columns)


def frozen(module: Module) -> Module:
    """Return a copy with no trainable parameter, in eval mode."""
    made = copy.deepcopy(module).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def fingerprint(module: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers, with their names: equal before and after, so nothing moved."""
    digest = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check(encoder: Any) -> Encoder:
    """Return the encoder; raise KnobError for what is none."""
    if not isinstance(encoder, Encoder):
        raise KnobError(f"encoder is a {type(encoder).__name__}; give a thrifty.fewshot.segmentation.Encoder")
    sizes = {len(encoder.channels), len(encoder.strides)}
    if len(sizes) != 1 or not 0 <= encoder.joined < len(encoder.channels):
        raise KnobError(
            f"{type(encoder).__name__}: channels {encoder.channels}, strides {encoder.strides} and joined "
            f"{encoder.joined} do not go together; one channel and one stride for each map"
        )
    return encoder
