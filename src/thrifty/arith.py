"""The integer rule, in words and NumPy: the one meaning of rounding, shifting and saturation.

In words: to divide by a power of two, add half of it and shift right arithmetically (ties go up, also for negative
numbers); then clamp to the range of the result. A real number x is stored as the integer nearest to x / scale, ties
up, computed in float32 as floor(x * (1/scale) + 0.5), then clamped. Products are summed in int32, which lowering
proves cannot overflow.

Every function here uses only operators that NumPy arrays and torch tensors share, so that hard torch, the NumPy
interpreter and the generated code have one definition. C: deploy/c/kernels/arith.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from thrifty.errors import KnobError

T = TypeVar("T", bound=Any)
Array = npt.NDArray[Any]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Format:
    """How the stored integers of a tensor stand for real numbers: real = integer * scale.

    There is no zero point: zero is always exactly the integer 0.

    >>> Format(8, True, (0.5,)).low, Format(8, False, (0.5,)).high
    (-128, 255)
    """

    bits: int  # width of the stored integer, sign included: 2..16
    signed: bool  # False only after a ReLU, and only for 8 bits or fewer
    scale: tuple[float, ...]  # one number, or one per output channel (weights); each a float32 value

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise KnobError(f"Format.bits is {self.bits}; it must be 2..16")
        if not self.scale or not all(2.0**-126 <= s <= 2.0**126 for s in self.scale):  # 1 / s is float32 too
            raise KnobError(
                f"a scale must lie in 2^-126..2^126, unlike {self.scale[:4]}; multiply the data or the weights by a "
                "constant, so that values are near one"
            )

    @property
    def low(self) -> int:
        """Smallest stored integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest stored integer."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return all(math.frexp(s)[0] == 0.5 for s in self.scale)

    @property
    def scale_exp(self) -> tuple[int, ...]:
        """Exponents e of the scales 2^e; raises KnobError when a scale is no power of two."""
        if not self.power_of_two:
            raise KnobError(f"scale {self.scale[:4]} is not a power of two")
        return tuple(math.frexp(s)[1] - 1 for s in self.scale)


def round_shift(value: T, shift: Any) -> T:
    """Divide integers by 2^shift, ties up; a negative shift multiplies.

    value: integers of any shape; shift: int, or integers that broadcast.

    >>> round_shift(np.array([-4832, 4832]), 6)
    array([-75,  76])
    """
    if isinstance(shift, int):
        return cast(T, value << -shift if shift <= 0 else (value + (1 << (shift - 1))) >> shift)
    right = shift.clip(0, 62)
    half = (1 << right) >> 1
    return cast(T, ((value << (-shift).clip(0, 62)) + half) >> right)


def floor_shift(value: T, shift: int) -> T:
    """Divide integers by 2^shift rounding down: MicroAI's own rule, an option of Quantize only."""
    return cast(T, value << -shift if shift <= 0 else value >> shift)


def saturate(value: T, low: int, high: int) -> T:
    """Clamp integers to [low, high].

    >>> saturate(np.array([-129, 5, 128]), -128, 127)
    array([-128,    5,  127])
    """
    return cast(T, value.clip(low, high))


def scale_by(acc: T, multiplier: Any, pre_shift: int = 0) -> T:
    """Multiply int32 accumulators by multiplier / 2^32 with one rounding, ties up: (acc * m + 2^31) >> 32.

    acc: int64 holding int32 values; multiplier: int64, broadcast over the last axis; pre_shift: a left shift of acc
    first, for scales of one half and more.

    >>> scale_by(np.array([1000]), np.array([2**30]))
    array([250])
    """
    return cast(T, ((acc << pre_shift) * multiplier + (1 << 31)) >> 32)


def multipliers(scale: npt.ArrayLike) -> tuple[Array, int]:
    """Return (int64 multipliers below 2^31, pre_shift) such that scale_by multiplies by `scale`.

    scale: (channels,) positive reals, s_in * s_weight / s_out.
    Raises KnobError when a scale is 2^15 or more.

    >>> multipliers([0.25])
    (array([1073741824]), 0)
    """
    real = np.atleast_1d(np.asarray(scale, dtype=np.float64))
    top = float(real.max())
    pre_shift = max(0, math.frexp(top)[1] + 1)
    if pre_shift > 16:
        raise KnobError(f"a requantisation scale of {top:g} is too large; the ranges of the layer do not fit")
    m = np.floor(real * 2.0 ** (32 - pre_shift) + 0.5).astype(np.int64)
    if m.max() > INT32_MAX:  # rounding up to exactly 2^31
        pre_shift += 1
        m = np.floor(real * 2.0 ** (32 - pre_shift) + 0.5).astype(np.int64)
    return m, pre_shift


def sum_multipliers(ratios: npt.ArrayLike, limit: int) -> tuple[Array, int]:
    """Return (int64 multipliers at most `limit`, shift) with ratio = multiplier / 2^shift, for additions.

    ratios: (inputs,) positive reals, s_in / s_out; limit: 32767 for 8-bit inputs, 16383 for 16-bit inputs.

    >>> sum_multipliers([1.0, 0.5], 32767)
    (array([16384,  8192]), 14)
    """
    real = np.asarray(ratios, dtype=np.float64)
    shift = 30
    while shift > 0 and np.floor(real.max() * 2.0**shift + 0.5) > limit:
        shift -= 1
    m = np.floor(real * 2.0**shift + 0.5).astype(np.int64)
    if m.max() > limit:
        raise KnobError(f"an addition needs a scale ratio of {real.max():g}; the ranges of its inputs do not fit")
    return m, shift


def reciprocal(scale: npt.ArrayLike) -> Array:
    """Return 1 / scale in float32, the number that quantisation multiplies by."""
    return (np.float32(1.0) / np.asarray(scale, dtype=np.float32)).astype(np.float32)


def quantize(real: npt.ArrayLike, fmt: Format, axis: int | None = None) -> Array:
    """Return int32 integers floor(x * (1/scale) + 0.5) clamped to the format, computed in float32.

    real: reals of any shape; axis: which axis the scales of `fmt` run along, when there are several.

    >>> quantize([1.5, -2.25, 0.75, 99.0], Format(8, True, (2.0**-5,)))
    array([ 48, -72,  24, 127], dtype=int32)
    """
    x = np.asarray(real, dtype=np.float32)
    inv = _along(reciprocal(fmt.scale), x.ndim, axis)
    with np.errstate(over="ignore"):  # what becomes infinite is clamped
        q = np.floor((x * inv).astype(np.float32) + np.float32(0.5))
    return cast(Array, np.clip(q, fmt.low, fmt.high).astype(np.int32))


def dequantize(stored: npt.ArrayLike, fmt: Format, axis: int | None = None) -> Array:
    """Return float32 reals integer * scale.

    >>> dequantize([48], Format(8, True, (2.0**-5,)))
    array([1.5], dtype=float32)
    """
    q = np.asarray(stored)
    return (q.astype(np.float32) * _along(np.asarray(fmt.scale, dtype=np.float32), q.ndim, axis)).astype(np.float32)


def power_of_two_scale(magnitude: float, bits: int, signed: bool = True) -> float:
    """Return the power-of-two scale for values up to `magnitude`.

    Source: MicroAI (Novac et al. 2021), integer part i = floor(log2 M) + 1, fraction bits n = bits - 1 - i.
    A magnitude of 0 gets n = bits - 1.

    >>> [int(-math.log2(power_of_two_scale(m, 8))) for m in (1.0, 0.999, 0.5, 2.0, 3.1, 127.0, 0.0)]
    [6, 7, 7, 5, 5, 0, 7]
    """
    width = bits - 1 if signed else bits
    integer_part = math.frexp(magnitude)[1] if magnitude > 0 else 0
    return 2.0 ** (integer_part - width)


def _along(values: Array, ndim: int, axis: int | None) -> Array:
    if values.size == 1:
        return values.reshape(())
    if axis is None:
        raise KnobError(f"{values.size} scales need an axis")
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
