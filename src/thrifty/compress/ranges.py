"""How far the stored range of a tensor reaches: largest value, percentile, or least squared error.

A range is a magnitude M; the scale follows from it: M / largest integer, or a power of two
(arith.power_of_two_scale).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thrifty.arith import power_of_two_scale
from thrifty.compress.fake_quantize import along, integers, limits

RANGES = ("minmax", "percentile", "mse")
SCALES = ("multiplier", "power_of_two")
SHARES = tuple(1.0 - 0.02 * i for i in range(41))  # of the largest magnitude, that "mse" tries: 1.00 down to 0.20
SMALLEST = 2.0**-10  # a channel's scale is at least this share of the layer's largest: dead channels stay harmless


def scale_of(magnitude: float, bits: int, signed: bool, scales: str) -> float:
    """Return the scale whose range holds values up to `magnitude`, as a float32 value.

    scales: one of SCALES. A magnitude of 0 gets the scale of magnitude 1.

    >>> scale_of(2.54, 8, True, "multiplier"), scale_of(2.54, 8, True, "power_of_two")
    (0.019999999552965164, 0.03125)
    """
    if scales == "power_of_two":
        return power_of_two_scale(magnitude, bits, signed)
    high = limits(bits, signed)[1]
    return float(torch.tensor((magnitude if magnitude > 0 else 1.0) / high, dtype=torch.float32))


def scales_of(magnitudes: Tensor, bits: int, signed: bool, scales: str) -> Tensor:
    """Return the scales of several ranges: (C,) float32; tiny ones are raised to a share of the largest."""
    top = float(magnitudes.max())
    floor = top * SMALLEST
    values = [scale_of(max(float(m), floor), bits, signed, scales) for m in magnitudes]
    return torch.tensor(values, dtype=torch.float32)


def weight_magnitudes(weight: Tensor, per_channel: bool) -> Tensor:
    """Return the largest magnitude of each output channel (Co,), or of the whole weight (1,)."""
    flat = weight.detach().abs().reshape(weight.shape[0] if per_channel else 1, -1)
    return flat.amax(1)


def weight_shares(weight: Tensor, bits: int, scales: str, ranges: str, per_channel: bool) -> Tensor:
    """Return the share of the largest magnitude that each scale's range shall keep: (Co,) or (1,).

    "mse" tries SHARES and keeps the one of least squared error; "minmax" and "percentile" keep everything,
    because few weights make one channel, and each matters.
    """
    top = weight_magnitudes(weight, per_channel)
    best = torch.ones_like(top)
    if ranges != "mse":
        return best
    rows = weight.detach().reshape(len(top), -1)
    least = torch.full_like(top, math.inf)
    for share in _shares(scales):
        scale = scales_of(top * share, bits, True, scales)
        error = (integers(rows, scale, bits, True, 0) * along(scale, 2, 0) - rows).square().sum(1)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best


def activation_magnitude(values: Tensor, bits: int, signed: bool, scales: str, ranges: str, percentile: float) -> float:
    """Return the range of an activation, from values seen in calibration (1-D, may be a random part of them).

    percentile: share of the magnitudes, in percent, that "percentile" keeps unclipped.
    """
    sizes = values.abs()
    top = float(sizes.max()) if len(sizes) else 0.0
    if ranges == "minmax" or top == 0.0:
        return top
    if ranges == "percentile":
        rank = max(1, math.ceil(percentile / 100 * len(sizes)))
        kept = float(sizes.kthvalue(rank).values)
        return kept if kept > 0 else top
    best, least = top, math.inf
    for share in _shares(scales):
        scale = values.new_tensor([scale_of(top * share, bits, signed, scales)])
        error = float((integers(values, scale, bits, signed) * scale - values).square().sum())
        if error < least:
            best, least = top * share, error
    return best


def _shares(scales: str) -> tuple[float, ...]:
    return SHARES if scales == "multiplier" else (1.0, 0.5, 0.25)
