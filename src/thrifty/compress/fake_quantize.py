"""Round to the stored integers and back, with a straight-through gradient, as one operator that
`torch.export` keeps.

The value is bit for bit `arith.dequantize(arith.quantize(x, format), format)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.arith import Format
from thrifty.errors import KnobError


def integers(x: Tensor, scale: Tensor, bits: int, signed: bool, axis: int = -1) -> Tensor:
    """Return floor(x * (1/scale) + 0.5) clamped to the format, as float32 integers; the torch twin of
    arith.quantize.

    x: float32 of any shape; scale: (1,), or (C,) along `axis`.
    """
    low, high = limits(bits, signed)
    return torch.floor(x * along(1.0 / scale, x.ndim, axis) + 0.5).clamp(low, high)


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and the largest stored integer.

    >>> limits(8, True), limits(8, False)
    ((-128, 127), (0, 255))
    """
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def along(values: Tensor, ndim: int, axis: int) -> Tensor:
    """Return (C,) values shaped to broadcast along `axis` of `ndim` axes; axis -1 means one value."""
    if axis < 0:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


_SCHEMA = "(Tensor x, Tensor scale, int bits, bool signed, int axis) -> Tensor"


def _forward(x: Tensor, scale: Tensor, bits: int, signed: bool, axis: int) -> Tensor:
    if x.dtype != torch.float32 or scale.dtype != torch.float32:
        raise KnobError(f"thrifty::fake_quantize works on float32, not on {x.dtype} with a scale of {scale.dtype}")
    return integers(x, scale, bits, signed, axis) * along(scale, x.ndim, axis)


def _fake(x: Tensor, scale: Tensor, bits: int, signed: bool, axis: int) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.bits, ctx.signed, ctx.axis = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through inside the range, zero outside; for a learned scale, the gradient of LSQ.

    Source of the scale's gradient: Esser et al. 2020, Learned Step Size Quantization, eq. 3
    (arXiv:1902.08153).
    """
    x, scale = ctx.saved_tensors
    low, high = limits(ctx.bits, ctx.signed)
    ratio = x * along(1.0 / scale, x.ndim, ctx.axis)
    rounded = torch.floor(ratio + 0.5)
    inside = (rounded >= low) & (rounded <= high)
    grad_scale = None
    if ctx.needs_input_grad[1]:
        slope = torch.where(inside, rounded - ratio, rounded.clamp(low, high)) * grad
        axes = [i for i in range(x.ndim) if i != ctx.axis]
        grad_scale = slope.sum(axes).reshape(scale.shape) if axes else slope
    return grad * inside, grad_scale, None, None, None


# The operator torch.ops.thrifty.fake_quantize. `capture` recognises it by this name.
_op = torch.library.custom_op("thrifty::fake_quantize", _forward, mutates_args=(), schema=_SCHEMA)
_op.register_fake(_fake)
_op.register_autograd(_backward, setup_context=_save)


def fake_quantize(x: Tensor, scale: Tensor, bits: int, signed: bool = True, axis: int = -1) -> Tensor:
    """Return x rounded to `bits`-bit integers times `scale`.

    x: float32 of any shape; scale: float32, (1,) or (C,) along `axis` (-1: one scale for the tensor).
    The gradient goes straight through inside the range and is zero outside.

    >>> fake_quantize(torch.tensor([0.3, 9.0]), torch.tensor([0.25]), bits=4)
    tensor([0.2500, 1.7500])
    """
    out: Tensor = torch.ops.thrifty.fake_quantize(x, scale, bits, signed, axis)
    return out


class WeightQuantizer(nn.Module):
    """Parametrisation that rounds a weight to integers times a scale; the scale is a buffer that others set.

    weight: (Co, ...); scale: (1,) or (Co,) along axis 0. `ratio` is the share of the largest magnitude that
    the range keeps, one per scale: QAT derives the scale from it and from the current weights at each step.
    """

    scale: Tensor
    ratio: Tensor

    def __init__(self, bits: int, scales: int = 1) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones(scales))
        self.register_buffer("ratio", torch.ones(scales))

    @property
    def axis(self) -> int:
        """Axis of the scales; -1 for one scale."""
        return 0 if self.scale.numel() > 1 else -1

    @property
    def format(self) -> Format:
        """The format of the stored weight."""
        return Format(self.bits, True, tuple(float(s) for s in self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight."""
        return fake_quantize(weight, self.scale, self.bits, True, self.axis)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the tensor to keep for a weight that is assigned: itself."""
        return weight

    def extra_repr(self) -> str:
        """Show the width and the number of scales."""
        return f"bits={self.bits}, scales={self.scale.numel()}"

    def spec(self) -> dict[str, Any]:
        """Return what rebuilds this parametrisation, as JSON."""
        return {"bits": self.bits, "scales": self.scale.numel()}

    @classmethod
    def from_spec(cls, layer: nn.Module, spec: Mapping[str, Any]) -> WeightQuantizer:
        """Rebuild from `spec()`; `layer` (the module that it will sit on) is not needed here."""
        return cls(int(spec["bits"]), int(spec["scales"]))
