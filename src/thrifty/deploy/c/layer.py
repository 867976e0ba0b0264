"""conv, linear and depthwise calls as one kind of layer, and how their sums are finished by an inner C kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.arith import INT32_MAX
from thrifty.deploy.program import Buffer, Call

Array = npt.NDArray[Any]

LARGEST = {"int8": 128, "uint8": 255, "int16": 32768}
TYPE_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
FACTOR = {"W8": 0, "W16": 0, "W4": 12, "W4X": 4}  # sums carry a factor of 2^this: kernels/block.h


@dataclass(frozen=True)
class Layer:
    """A conv, linear or depthwise call as one grouped convolution."""

    weight: Array  # (Co, kh, kw, Ci of a group), int64
    bias: Array  # (Co,), int64
    groups: int
    stride: tuple[int, int]
    pad: tuple[int, int, int, int]  # top, bottom, left, right
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    in_type: str
    out_type: str
    weight_bits: int
    low: int
    high: int
    requant: str
    multiplier: Array | None  # (Co,), int64
    pre_shift: int
    shift: tuple[int, ...]  # one, or Co
    rounding: str

    @property
    def bound(self) -> int:
        """Largest magnitude that any sum can reach."""
        sums = np.abs(self.weight).sum(axis=(1, 2, 3)) * LARGEST[self.in_type] + np.abs(self.bias)
        return int(sums.max())


def layer_of(call: Call, x: Buffer, y: Buffer) -> Layer:
    """Return an integer call in one form.

    A linear layer becomes a 1x1 convolution of one pixel, a 1x1 convolution one row of pixels.
    """
    a, weight = call.attrs, np.asarray(call.constants["weight"]).astype(np.int64)
    stride, pad, groups, in_shape, out_shape = (1, 1), (0, 0, 0, 0), 1, x.shape, y.shape
    if call.op == "linear":
        weight, in_shape, out_shape = weight[:, None, None, :], (1, 1, x.size), (1, 1, y.size)
    else:
        stride, pad = tuple(a["stride"]), tuple(a["pad"])
        if call.op == "depthwise":
            weight, groups = weight.transpose(2, 0, 1)[..., None], x.shape[2]
        else:
            groups = a["groups"]
    pixels = in_shape[0] * in_shape[1]
    if weight.shape[1:3] == (1, 1) and stride == (1, 1) and not any(pad) and pixels <= 65535:
        in_shape, out_shape = ((1, s[0] * s[1], s[2]) for s in (in_shape, out_shape))
    multiplier = call.constants.get("multiplier")
    low, high = TYPE_LIMITS[y.dtype]
    return Layer(
        weight=weight,
        bias=np.asarray(call.constants["bias"]).astype(np.int64),
        groups=groups,
        stride=stride,
        pad=pad,
        in_shape=in_shape,
        out_shape=out_shape,
        in_type=x.dtype,
        out_type=y.dtype,
        weight_bits=int(a.get("weight_bits", 8)),
        low=max(low, int(a["low"])),
        high=min(high, int(a["high"])),
        requant=a["requant"],
        multiplier=None if multiplier is None else np.asarray(multiplier).astype(np.int64),
        pre_shift=int(a.get("pre_shift", 0)),
        shift=tuple(int(s) for s in a.get("shift") or ()),
        rounding=a.get("rounding", "half_up"),
    )


# ---- how sums are finished ----


@dataclass(frozen=True)
class Form:
    """What an inner kernel does: its name, and the numbers that its way of requantising wants."""

    weights: str  # W8, W16, W4, W4X
    requant: str  # MULT, PRE, SHIFT
    store: str  # S8, U8, S16, U15, C8, C16
    bias: Array  # without the factor of the weights
    multiplier: Array | None
    shift: int

    @property
    def name(self) -> str:
        """Its part of the names of C functions."""
        return f"{self.weights}_{self.requant}_{self.store}".lower()


def inner_form(layer: Layer) -> Form | None:
    """Return the inner kernel that computes a layer exactly, or None when only the generic kernel does."""
    if layer.low > 0 or layer.high < 0:
        return None
    finish = _multiplier_finish(layer) if layer.requant == "multiplier" else _shift_finish(layer)
    if finish is None:
        return None
    for weights in ["W4", "W4X"] if layer.weight_bits <= 4 else ["W8"] if layer.weight_bits <= 8 else ["W16"]:
        if finish.bound << FACTOR[weights] <= INT32_MAX:
            shift = finish.shift + (FACTOR[weights] if finish.requant == "SHIFT" else 0)
            return Form(weights, finish.requant, _store(layer), finish.bias, finish.multiplier, shift)
    return None


def _store(layer: Layer) -> str:
    """Return how results are clamped and stored; limits that are no type's are the letter C."""
    limits = (layer.out_type, layer.low, layer.high)
    one_instruction = {
        ("int8", -128, 127): "S8",
        ("uint8", 0, 255): "U8",
        ("int16", -32768, 32767): "S16",
        ("int16", 0, 32767): "U15",
    }
    return one_instruction.get(limits, "C16" if layer.out_type == "int16" else "C8")


@dataclass(frozen=True)
class _Finish:
    requant: str
    bias: Array
    multiplier: Array | None
    shift: int
    bound: int  # largest magnitude of a sum with this bias


def _multiplier_finish(layer: Layer) -> _Finish:
    requant = "PRE" if layer.pre_shift else "MULT"
    return _Finish(requant, layer.bias, layer.multiplier, layer.pre_shift, layer.bound)


def _shift_finish(layer: Layer) -> _Finish | None:
    """Fold the rounding of one shift in the bias; else take 2^(32 - shift) as multipliers, the same number."""
    shift, half_up = np.array(layer.shift, dtype=np.int64), layer.rounding == "half_up"
    half = np.where(shift > 0, np.int64(1) << np.clip(shift - 1, 0, 40), 0)
    most = int(half.max())
    if len(set(layer.shift)) == 1 and shift[0] >= 0 and layer.bound + most * half_up <= INT32_MAX:
        bound = layer.bound + most * half_up
        return _Finish("SHIFT", layer.bias + half * half_up, None, int(min(shift[0], 31)), bound)
    pre = max(0, 2 - int(shift.min()))
    exponent = 32 - shift - pre
    bound = layer.bound + most * (not half_up)
    if bound << pre > INT32_MAX or (exponent.min() < 0 and (pre or not half_up)):
        return None
    powers = np.where(exponent < 0, 0, np.int64(1) << np.clip(exponent, 0, 30))
    multiplier = np.broadcast_to(powers, layer.bias.shape)
    return _Finish("PRE" if pre else "MULT", layer.bias - half * (not half_up), multiplier, pre, bound)
