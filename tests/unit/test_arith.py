"""arith: what a Format may hold (its rounding is proven in contract/test_battery_arithmetic.py)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thrifty.arith import Format, dequantize, quantize
from thrifty.errors import KnobError


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 2.0**-127, 2.0**127])
def test_a_scale_whose_inverse_is_no_normal_float32_is_refused(scale):
    with pytest.raises(KnobError, match="near one"):
        Format(8, True, (1.0, scale))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**126])
def test_the_outermost_scales_round_without_overflow(scale):
    fmt = Format(8, True, (scale,))
    x = np.array([-3.0, 0.0, 1.0, 1.5], np.float32) * np.float32(scale)
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(dequantize(quantize(x, fmt), fmt), np.float32(scale) * np.float32([-3, 0, 1, 2]))
