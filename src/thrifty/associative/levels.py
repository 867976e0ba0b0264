"""From features to levels, the small unsigned integers that learners take: ranges of reals, feeds of integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty import arith
from thrifty.associative.vote import bounds
from thrifty.errors import DataError, KnobError

Array = npt.NDArray[Any]

STORED = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}


@dataclass(frozen=True)
class Range:
    """A calibrated range of real features, frozen: level = clip(floor((x - low) / (high - low) * (2^bits - 1) + 1/2)).

    low, high: one number, or one for each of the equal parts that the features are split into (`bounds`).
    Computed in float64 from float32 features, so that float64 copies of them get the same levels.
    Source: 1911.07847 as derived in the project's notes; half up.

    >>> Range((0.0,), (1.0,), 8).levels(np.array([[0.0, 0.5, 2.0]], np.float32))
    (array([[  0, 128, 255]], dtype=uint8), array([1]))
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise KnobError(f"Range.bits is {self.bits}; it must be 1..8")
        if len(self.low) != len(self.high) or not self.low:
            raise KnobError(f"Range has {len(self.low)} lows and {len(self.high)} highs; give as many of each")
        wrong = [i for i, (a, b) in enumerate(zip(self.low, self.high)) if not (np.isfinite([a, b]).all() and a < b)]
        if wrong:
            i = wrong[0]
            raise KnobError(f"Range {i} is {self.low[i]}..{self.high[i]}; low must lie below high, both finite")

    @property
    def top(self) -> int:
        """The largest level."""
        return (1 << self.bits) - 1

    def levels(self, x_nd: npt.ArrayLike) -> tuple[Array, Array]:
        """Return uint8 levels (n, d) and how many values of each example lay outside the range (n,)."""
        x = np.asarray(x_nd, np.float32).astype(np.float64)
        if not np.isfinite(x).all():
            raise DataError("features have NaN or infinity; a level is a finite number")
        low = self._spread(self.low, x.shape[1])
        width = self._spread(tuple(b - a for a, b in zip(self.low, self.high)), x.shape[1])
        raw = np.floor((x - low) / width * self.top + 0.5)
        outside = (raw < 0) | (raw > self.top)
        return np.clip(raw, 0, self.top).astype(np.uint8), outside.sum(axis=1)

    def _spread(self, values: tuple[float, ...], features: int) -> Array:
        if len(values) == 1:
            return np.full(features, values[0])
        if len(values) > features:
            raise DataError(f"the range has {len(values)} parts, the features only {features} dimensions")
        return np.repeat(np.array(values), np.diff(bounds(features, len(values))))


@dataclass(frozen=True)
class Feed:
    """How the stored integers of a network's output become levels, on integers only.

    level = clamp(round_shift((q + offset) * multiplier, shift), 0, 2^bits - 1), the rule of thrifty.arith. For an
    8-bit output the levels are the stored integers themselves, moved to 0..255: nothing is lost.

    >>> Feed.of("int8").levels(np.array([[-128, 0, 127]]))
    (array([[  0, 128, 255]], dtype=uint8), array([0]))
    """

    offset: int
    multiplier: int = 1
    shift: int = 0
    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise KnobError(f"Feed.bits is {self.bits}; it must be 1..8")
        if not (abs(self.offset) <= 1 << 15 and 1 <= self.multiplier < 1 << 14 and 0 <= self.shift <= 30):
            raise KnobError(
                f"Feed({self.offset}, {self.multiplier}, {self.shift}) leaves int32: offset at most 2^15, multiplier "
                "1..2^14 - 1, shift 0..30"
            )

    @property
    def top(self) -> int:
        """The largest level."""
        return (1 << self.bits) - 1

    @staticmethod
    def of(dtype: str, low: int | None = None, high: int | None = None, bits: int = 8) -> Feed:
        """Return the feed that takes stored integers low..high of a type to 0..2^bits - 1.

        low, high: calibrated once and frozen; None = the whole type. Raises KnobError for other types than
        int8, uint8, int16.
        """
        if dtype not in STORED:
            raise KnobError(f"features are {dtype}; a learner takes {', '.join(STORED)}: quantise the network first")
        least, most = STORED[dtype]
        low, high = least if low is None else int(low), most if high is None else int(high)
        if not least <= low < high <= most:
            raise KnobError(f"the range {low}..{high} does not lie in {dtype}, {least}..{most}")
        top = (1 << bits) - 1
        if high - low == top:
            return Feed(-low, bits=bits)
        shift = 0
        while shift < 30 and round(top / (high - low) * 2 ** (shift + 1)) < 1 << 14:
            shift += 1
        return Feed(-low, max(1, round(top / (high - low) * 2**shift)), shift, bits)

    @staticmethod
    def like(real: Range, dtype: str, scale: float) -> Feed:
        """Return the feed nearest to a range of reals, of one part, for stored integers of a type and scale.

        Its levels are those of the range up to rounding: learn with the feed wherever bytes must agree.

        >>> Feed.like(Range((0.0,), (25.5,)), "uint8", 0.1)
        Feed(offset=0, multiplier=1, shift=0, bits=8)
        """
        if len(real.low) > 1:
            raise KnobError(f"the range has {len(real.low)} parts; a feed has one")
        least, most = STORED.get(dtype, (0, 0))
        low = max(least, min(most - 1, round(real.low[0] / scale)))
        high = max(low + 1, min(most, round(real.high[0] / scale)))
        return Feed.of(dtype, low, high, real.bits)

    def levels(self, q_nd: npt.ArrayLike) -> tuple[Array, Array]:
        """Return uint8 levels (n, d) and how many values of each example were clamped (n,)."""
        wide = (np.asarray(q_nd).astype(np.int64) + self.offset) * self.multiplier
        raw = arith.round_shift(wide, self.shift)
        outside = (raw < 0) | (raw > self.top)
        return np.clip(raw, 0, self.top).astype(np.uint8), outside.sum(axis=1)
