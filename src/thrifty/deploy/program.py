"""The integer form of a network: buffers, constants, calls, an arena plan. Plain data, no torch.

Activations are held channels-last, (H, W, C), one example at a time; a vector is (1, 1, C), a 1-D signal (1, L, C).
Every call reads whole buffers and writes one. What each operator means is its `compute` in deploy/ops, on integers:

    conv       acc = bias[co] + sum x[oy*sh + ky - top, ox*sw + kx - left, ci] * weight[co, ky, kx, ci]
               (taps outside contribute 0; with groups, ci runs over the group of co)
               y = clamp(requantise(acc), low, high)
               attrs: stride (sh, sw), pad (top, bottom, left, right), groups, weight_bits, + requantisation
               constants: weight int8/int16 (Co, kh, kw, Ci/groups), bias int32 (Co,) [, multiplier int32 (Co,)]
    depthwise  the same with one filter per channel; weight (kh, kw, C)
    linear     the same; the input is read flat in (H, W, C) order; weight (Co, K)
    add        y = clamp(round_shift(a * multipliers[0] + b * multipliers[1], shift), low, high)
    concat     y = for each input k, clamp(round_shift(x_k * multipliers[k], shift), low, high); axis 0|1|2 of (H, W, C)
    rescale    y = clamp(round_shift(x * multipliers[0], shift), low, high)
    clamp      y = clamp(x, low, high)
    lookup     y = table[x - lowest x]; constants: table (256,) of the output's type; 8-bit inputs, lowest -128 or 0
    hardswish  y = (x * clamp(x + 3, 0, 6)) / 6, float32 only (integers: lookup)
    maxpool    y = clamp(max over the window, low, high); windows are cut at the border; attrs kernel, stride, pad
    avgpool    y = clamp(requantise(sum over the window), low, high); taps outside are 0 and count; attrs kernel,
               stride, pad, + requantisation; constants: [multiplier int32 (1,)], which divides by the count as well
    softmax    over all elements: e = table[max - x]; y = min(255, (e * 256 + (sum >> 1)) // sum); uint8, scale 1/256
               constants: table int32 (256,), floor(exp(-d * scale) * 2^20 + 0.5)
    argmax     index of the first largest element, int32 (1, 1, 1)
    permute    attrs axes, of (H, W, C)
    copy       y = x, reshaped (flatten; an alias when the planner allows it)

requantisation, attrs["requant"]:
    "multiplier"  ((acc << pre_shift) * multiplier[co] + 2^31) >> 32     (arith.scale_by; attrs pre_shift)
    "shift"       round_shift(acc, shift[co]); attrs shift: tuple, one or Co, -31..31; rounding "half_up" | "floor"
    "float"       nothing (float32 programs: the same operators on float32, acc summed from bias on in the order of
                  (ky, kx, ci), each product and each sum rounded to float32; low and high are floats, may be -inf/inf)
Every call carries all the attributes named here, whatever their values. Lowering has proven, by interval arithmetic
from the limits of each input, that in no order of summation a partial sum, with bias and rounding constant, leaves
int32, nor acc shifted left by pre_shift or a negative shift. Equal constants are one array object.

float32: clamp is low if x < low else (high if x > high else x); max keeps the first of equals; avgpool divides the
sum, taken from 0 in (ky, kx) order, by the count; add is a + b; multipliers are 1, shift 0; softmax: ops/softmax.py.
Names: the input buffer is named after the input, the others "<call>_out"; a call after its node, or after the layer
into which an activation is fused. A node that becomes several calls adds _clamp, _order or _rescale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

ITEM_BYTES = {"int8": 1, "uint8": 1, "int16": 2, "int32": 4, "float32": 4}


@dataclass(frozen=True)
class Buffer:
    """One activation tensor of the program, or the scratch memory of one call."""

    name: str
    shape: tuple[int, int, int]  # (H, W, C)
    dtype: str  # int8, uint8, int16, int32 or float32
    scale: float = 1.0  # real value of one unit
    module: str = ""  # module path of the layer that writes it

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return self.size * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Call:
    """One step: an operator applied to buffers."""

    op: str
    name: str  # C identifier, unique in the program
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Array] = field(default_factory=dict)
    module: str = ""  # module path it came from
    macs: int = 0


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies in the arena.

    `offsets` has an entry for each buffer of the program and, under the name of the call, for the scratch memory
    of each call that needs some.
    """

    offsets: Mapping[str, int]
    arena_bytes: int
    bound_bytes: int  # the largest sum of simultaneously live bytes: no plan can be smaller
    lives: Mapping[str, tuple[int, int]]  # first and last call index at which each is alive, inclusive
    sizes: Mapping[str, int]  # bytes of each


@dataclass(frozen=True)
class Program:
    """A network of integers (or of float32), ready for the interpreter, for C and for Verilog.

    `input` is written by the caller before the run, `output` read after it; both lie in the arena.
    """

    name: str
    buffers: Mapping[str, Buffer]
    calls: tuple[Call, ...]
    input: str
    output: str
    classes: int = 0  # length of the output when it is a score vector

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return sum(c.macs for c in self.calls)

    @property
    def constant_bytes(self) -> int:
        """Bytes of weights, biases, multipliers and tables, before any padding by the C back end."""
        total = 0
        for call in self.calls:
            for key, value in call.constants.items():
                stored = value.dtype.itemsize * 8
                bits = call.attrs.get("weight_bits", stored) if key == "weight" else stored
                total += (value.size * int(bits) + 7) // 8
        return total
