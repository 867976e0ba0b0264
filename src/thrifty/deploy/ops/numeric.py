"""What several operators compute with: windows over a map, clamping, requantisation of a call."""

from __future__ import annotations

from typing import Any

import numpy as np

from thrifty.deploy.program import Array, Buffer, Call
from thrifty.integer import Requant


def windows(
    x: Array,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, ...],
    out: tuple[int, int],
    fill: Any = 0,
) -> Array:
    """Return a view (n, oy, ox, ky, kx, C) of the windows over x (n, H, W, C); `fill` stands outside the map.

    pad: (top, bottom, left, right), of which top and left count; out: (oy, ox), the number of windows.
    """
    (kh, kw), (sh, sw), (top, _, left, _) = kernel, stride, pad
    _, height, width, _ = x.shape
    bottom = max(0, (out[0] - 1) * sh + kh - height - top)
    right = max(0, (out[1] - 1) * sw + kw - width - left)
    if top or left or bottom or right:
        x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))
    view = view[:, : (out[0] - 1) * sh + 1 : sh, : (out[1] - 1) * sw + 1 : sw]
    return view.transpose(0, 1, 2, 4, 5, 3)


def requantised(acc: Array, call: Call, out: Buffer) -> Array:
    """Return clamp(requantise(acc), low, high) in the type of `out`; acc: int64, or float32, (n, H, W, C)."""
    if call.attrs["requant"] == "float":
        return clamped(acc, call, out)
    return clamped(scaling(call).apply(acc), call, out)


def scaling(call: Call) -> Requant:
    """Return the requantisation that a call carries in its attributes and constants."""
    a = call.attrs
    multiplier = call.constants["multiplier"].astype(np.int64) if a["requant"] == "multiplier" else None
    return Requant(a["requant"], multiplier, a["pre_shift"], a["shift"], a["rounding"])


def clamped(values: Array, call: Call, out: Buffer) -> Array:
    """Return low where a value is less, high where it is greater, in the type of `out`."""
    low, high = call.attrs["low"], call.attrs["high"]
    if out.dtype == "float32":
        values = np.where(values < np.float32(low), np.float32(low), values)
        return np.where(values > np.float32(high), np.float32(high), values).astype(np.float32)
    return np.clip(values, low, high).astype(out.dtype)


def integer_product(a: Array, b: Array) -> Array:
    """Return the matrix product of integers as int64, through BLAS where its floats are exact.

    a: (..., m, k); b: (..., k, n). Every partial sum is at most max|a| * (largest column sum of |b|).
    """
    largest = max(abs(int(a.min(initial=0))), abs(int(a.max(initial=0))))
    reach = largest * int(np.abs(b.astype(np.int64)).sum(axis=-2).max(initial=0))
    if reach >= 2**53:
        return np.asarray(a.astype(np.int64) @ b.astype(np.int64))
    real = np.float32 if reach < 2**24 else np.float64
    return np.asarray((a.astype(real) @ b.astype(real)).astype(np.int64))
