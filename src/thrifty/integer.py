"""From formats and float constants to integers: the constants that lowering and hard torch must agree on.

Both `deploy/lower.py` and `compress/quantize.py` call these, so that what is trained is what is deployed.
Arrays are NumPy; `Requant.apply` also takes torch tensors (it calls no function of either library by name).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty import arith
from thrifty.arith import INT32_MAX, Format
from thrifty.errors import KnobError
from thrifty.graph import FORMAT_KEEPING, Graph

Array = npt.NDArray[Any]

ROUNDINGS = ("half_up", "floor")
MAX_SHIFT = 31  # bits, either way: beyond, a nonzero sum gives 0 or 1 unit, or does not fit int32 at all
SOFTMAX_FORMAT = Format(8, False, (2.0**-8,))
SOFTMAX_LARGEST = 2047  # elements: their sum of 2^20 each still fits int32
ADD_LIMIT = {8: 32767, 16: 16383}  # largest multiplier of an addition, by bits of the widest input


@dataclass(frozen=True)
class Requant:
    """How int32 accumulators become integers of the output's scale, before clamping.

    "multiplier": ((acc << pre_shift) * multiplier[c] + 2^31) >> 32, always ties up.
    "shift": acc / 2^shift[c], rounded as `rounding` says; a negative shift multiplies.
    """

    kind: str  # "multiplier" | "shift"
    multiplier: Array | None = None  # int64 (channels,) or (1,), below 2^31
    pre_shift: int = 0
    shift: tuple[int, ...] = (0,)  # one, or one per channel; -MAX_SHIFT..MAX_SHIFT
    rounding: str = "half_up"  # "half_up" | "floor"; of "shift" only

    def apply(self, acc: Any) -> Any:
        """Return the scaled integers, not clamped.

        acc: int64 NumPy array or torch tensor, channels on the last axis, values of int32.

        >>> Requant("shift", shift=(6,)).apply(np.array([4832, -4832]))
        array([ 76, -75])
        """
        if self.kind == "multiplier":
            assert self.multiplier is not None
            return arith.scale_by(acc, _like(acc, self.multiplier), self.pre_shift)
        if len(self.shift) == 1:
            step = arith.floor_shift if self.rounding == "floor" else arith.round_shift
            return step(acc, self.shift[0])
        shift = _like(acc, np.asarray(self.shift, dtype=np.int64))
        if self.rounding == "floor":
            return (acc << (-shift).clip(0, 62)) >> shift.clip(0, 62)
        return arith.round_shift(acc, shift)

    @property
    def half(self) -> Array:
        """The rounding constants that are added to the accumulators: int64 (1,) or (channels,)."""
        if self.kind == "multiplier" or self.rounding == "floor":
            return np.zeros(1, np.int64)
        return np.array([(1 << s) >> 1 if s > 0 else 0 for s in self.shift], dtype=np.int64)

    @property
    def left_shift(self) -> Array:
        """By how many bits the accumulators are shifted left first: int64 (1,) or (channels,)."""
        if self.kind == "multiplier":
            return np.array([self.pre_shift], dtype=np.int64)
        return np.array([max(0, -s) for s in self.shift], dtype=np.int64)


def requant(in_scale: float, weight_scales: Sequence[float], out_scale: float, rounding: str = "half_up") -> Requant:
    """Return the requantisation by in_scale * weight_scale / out_scale, per output channel.

    It is a "shift" exactly when all scales are powers of two, and then one shift when all channels agree.
    Raises KnobError when a scale is 2^15 or more, or `rounding` is unknown.

    >>> requant(2.0**-5, (2.0**-6,), 2.0**-5)
    Requant(kind='shift', multiplier=None, pre_shift=0, shift=(6,), rounding='half_up')
    """
    if rounding not in ROUNDINGS:
        raise KnobError(f"rounding is {rounding!r}; it must be one of {', '.join(ROUNDINGS)}")
    if Format(16, True, (in_scale, out_scale, *weight_scales)).power_of_two:
        exponent = _exponent(in_scale) - _exponent(out_scale)
        shifts = tuple(max(-MAX_SHIFT, min(MAX_SHIFT, -(exponent + _exponent(s)))) for s in weight_scales)
        return Requant("shift", shift=shifts[:1] if len(set(shifts)) == 1 else shifts, rounding=rounding)
    real = float(in_scale) * np.asarray(weight_scales, dtype=np.float64) / float(out_scale)
    multiplier, pre_shift = arith.multipliers(real)
    return Requant("multiplier", multiplier, pre_shift)


def pool_requant(in_scale: float, out_scale: float, count: int, rounding: str = "half_up") -> Requant:
    """Return the requantisation of a sum of `count` elements to their mean: in_scale / (out_scale * count).

    A "shift" when both scales and the count are powers of two.

    >>> pool_requant(0.5, 0.5, 64).shift
    (6,)
    """
    if count & (count - 1) == 0:
        return requant(in_scale, (1.0 / count,), out_scale, rounding)
    if rounding not in ROUNDINGS:
        raise KnobError(f"rounding is {rounding!r}; it must be one of {', '.join(ROUNDINGS)}")
    multiplier, pre_shift = arith.multipliers([float(in_scale) / (float(out_scale) * count)])
    return Requant("multiplier", multiplier, pre_shift)


def weight_integers(weight: npt.ArrayLike, fmt: Format) -> Array:
    """Return int32 weights, floor(w / scale + 0.5) clamped; scales run along axis 0.

    weight: (Co, ...) reals.

    >>> weight_integers([[0.5, -0.25, 1.0]], Format(8, True, (2.0**-6,)))
    array([[ 32, -16,  64]], dtype=int32)
    """
    return arith.quantize(weight, fmt, axis=0)


def bias_integers(bias: npt.ArrayLike, in_scale: float, weight_scales: Sequence[float]) -> Array:
    """Return int32 biases floor(b / (in_scale * weight_scale) + 0.5), computed in float64.

    bias: (Co,) reals; weight_scales: one, or Co.
    Raises KnobError when one does not fit int32.

    >>> bias_integers([0.3], 2.0**-5, (2.0**-6,))
    array([614], dtype=int32)
    """
    q = _bias_units(bias, in_scale, weight_scales)
    if not np.all(np.abs(q) <= INT32_MAX):
        largest, units = float(np.max(np.abs(np.asarray(bias)))), float(np.max(np.abs(q)))
        raise KnobError(
            f"a bias of {largest:g} is {units:.3g} units of its accumulator, more than int32 holds "
            f"({INT32_MAX}); its weights need a coarser scale"
        )
    return q.astype(np.int32)


def acc_bound(weight_q: Array, bias_q: Array, low: int, high: int, pre_shift: int = 0) -> tuple[Array, Array]:
    """Return (least, greatest) int64 (Co,): what no partial sum leaves, in whatever order it is taken.

    weight_q: integers (Co, ...); bias_q: integers (Co,); low, high: limits of the inputs, to which 0 is added
    (padding); pre_shift: a left shift of the sum that follows.

    >>> acc_bound(np.full((1, 3), 127), np.zeros(1, int), 0, 127)
    (array([0]), array([48387]))
    """
    w = weight_q.astype(np.int64).reshape(len(weight_q), -1)
    up, down = w.clip(0).sum(axis=1), w.clip(None, 0).sum(axis=1)
    low, high = min(low, 0), max(high, 0)
    bias = bias_q.astype(np.int64)
    greatest = up * high + down * low + bias.clip(0)
    least = up * low + down * high + bias.clip(None, 0)
    return least << pre_shift, greatest << pre_shift


def overflow(weight_q: Array, bias_q: Array, low: int, high: int, scaling: Requant, limit: int = 2**31) -> str | None:
    """Return None when no accumulator can leave [-limit, limit), else a clause about the worst channel.

    Arguments as in `acc_bound`; the rounding constant and the left shift of `scaling` are included.

    >>> overflow(np.full((1, 3), 127), np.zeros(1, int), 0, 127, Requant("shift"), limit=2**15)
    'the sum of channel 0 may reach 48387, outside [-32768, 32767]'
    >>> overflow(np.full((1, 3), 127), np.zeros(1, int), 0, 127, Requant("shift"))
    """
    least, greatest = acc_bound(weight_q, bias_q, low, high)
    greatest = (greatest + scaling.half) << scaling.left_shift
    least = least << scaling.left_shift
    excess = np.maximum(greatest - (limit - 1), -limit - least)
    worst = int(np.argmax(excess))
    if excess[worst] <= 0:
        return None
    reach = int(greatest[worst] if greatest[worst] >= limit else least[worst])
    return f"the sum of channel {worst} may reach {reach}, outside [{-limit}, {limit - 1}]"


def weight_format(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    bits: int,
    inputs: tuple[float, int, int],
    out_scale: float,
    *,
    per_channel: bool = True,
    power_of_two: bool = True,
    rounding: str = "half_up",
) -> Format:
    """Return the finest weight format whose accumulators provably fit int32, so that lowering accepts it.

    weight: (Co, ...) reals; bias: (Co,) or None; inputs: (scale, low, high) of the input's integers;
    out_scale: scale of the output. power_of_two asks for scales of powers of two (MicroAI's rule), else
    max|w| is the largest integer. A channel of zeros takes the scale of the largest weight.
    Raises KnobError when no scale helps (out_scale is below `least_out_scale`).

    >>> weight_format([[0.5, -0.25, 1.0]], None, 8, (2.0**-5, -128, 127), 2.0**-5).scale_exp
    (-6,)
    """
    w = np.asarray(weight, dtype=np.float32)
    rows = w.reshape(len(w), -1) if per_channel else w.reshape(1, -1)
    magnitude = np.abs(rows).max(axis=1).astype(np.float64)
    magnitude = np.where(magnitude > 0, magnitude, magnitude.max())
    scale = np.array([_scale_of(m, bits, power_of_two) for m in magnitude])
    b = np.zeros(len(w)) if bias is None else np.asarray(bias, dtype=np.float64)
    hopeless = _reach(w, b, inputs) > out_scale * 2.0**29  # a coarser scale cannot undo a left shift
    for _ in range(0 if hopeless else 64):
        fmt = Format(bits, True, tuple(float(np.float32(s)) for s in scale))
        scaling = requant(inputs[0], fmt.scale, out_scale, rounding)
        fill = _fill(w, b, fmt, inputs, scaling)
        if fill.max() <= 1:
            return fmt
        fill = fill if per_channel else fill.max(keepdims=True)
        scale = np.where(fill > 1, scale * (2.0 if power_of_two else np.minimum(fill, 2.0) * 1.0001), scale)
    least = least_out_scale(w, b, inputs)
    raise KnobError(
        f"no weight scale keeps the sums within int32: the output's scale is {out_scale:g}; make it at least {least:g}"
    )


def least_out_scale(weight: npt.ArrayLike, bias: npt.ArrayLike | None, inputs: tuple[float, int, int]) -> float:
    """Return an output scale at and above which the requantisation of this layer surely fits.

    Arguments as in `weight_format`. Only layers whose outputs are almost constant zero come near it.

    >>> least_out_scale([[1.0]], None, (1.0, -128, 127)) == 2.0**-14
    True
    """
    w = np.asarray(weight, dtype=np.float64)
    b = np.zeros(len(w)) if bias is None else np.asarray(bias, dtype=np.float64)
    return max(_reach(w, b, inputs) * 2.0**-27, float(np.abs(w).max()) * inputs[0] * 2.0**-14, 2.0**-117)


def batchnorm_format(
    scale: npt.ArrayLike, shift: npt.ArrayLike, in_format: Format, limits: tuple[int, int], out_format: Format
) -> Format:
    """Return the format of the weights of a batch norm that stays an operator of its own (per channel).

    scale, shift: (C,); limits: (low, high) of the input's integers. 8 bits after an input of 8 bits or fewer,
    else 16; powers of two exactly when both activation formats are.
    """
    bits = 8 if in_format.bits <= 8 else 16
    w = np.asarray(scale, dtype=np.float32).reshape(-1, 1)
    both = in_format.power_of_two and out_format.power_of_two
    inputs = (in_format.scale[0], *limits)
    return weight_format(w, shift, bits, inputs, out_format.scale[0], power_of_two=both)


def add_constants(in_scales: Sequence[float], out_scale: float, bits: int) -> tuple[tuple[int, ...], int]:
    """Return (multipliers, shift) of y = round_shift(sum of x_k * multiplier_k, shift).

    bits: of the widest input; 8 or fewer allows multipliers up to 32767, 16 up to 16383.
    Raises KnobError when an input's scale is more than that many times the output's.

    >>> add_constants([1.0, 0.5], 1.0, 8)
    ((16384, 8192), 14)
    """
    ratios = np.asarray(in_scales, dtype=np.float64) / float(out_scale)
    m, shift = arith.sum_multipliers(ratios, ADD_LIMIT[8 if bits <= 8 else 16])
    return tuple(int(v) for v in m), shift


def clamp_limits(fmt: Format, activation: str | None = None) -> tuple[int, int]:
    """Return (low, high) of an output of this format after None, "relu" or "relu6".

    >>> clamp_limits(Format(8, True, (0.0625,)), "relu6")
    (0, 96)
    """
    low, high = fmt.low, fmt.high
    if activation in ("relu", "relu6"):
        low = max(low, 0)
    if activation == "relu6":
        high = int(arith.quantize(6.0, fmt))
    return low, high


def lookup_table(fn: Callable[[Array], Array], in_fmt: Format, out_fmt: Format) -> Array:
    """Return the (256,) table y = table[x - lowest x] of an element-wise real function, in the output's type.

    in_fmt: 8 bits or fewer (the table covers every int8 or uint8). Raises KnobError for more.

    >>> lookup_table(np.abs, Format(8, True, (1.0,)), Format(8, True, (1.0,)))[[0, 126, 128]]
    array([127,   2,   0], dtype=int8)
    """
    if in_fmt.bits > 8:
        raise KnobError(f"a lookup table takes inputs of 8 bits or fewer, not {in_fmt.bits}")
    first = -128 if in_fmt.signed else 0
    real = arith.dequantize(np.arange(first, first + 256), in_fmt)
    return np.asarray(arith.quantize(fn(real), out_fmt).astype(storage(out_fmt)))


def hardswish(real: Array) -> Array:
    """Return x * clamp(x + 3, 0, 6) / 6 in float32, each step rounded.

    >>> hardswish(np.array([-4.0, 0.0, 3.0]))
    array([-0.,  0.,  3.], dtype=float32)
    """
    x = np.asarray(real, dtype=np.float32)
    gate = np.clip(x + np.float32(3), np.float32(0), np.float32(6))
    return np.asarray((x * gate) / np.float32(6), dtype=np.float32)


def softmax_table(scale: float) -> Array:
    """Return int32 (256,): floor(exp(-d * scale) * 2^20 + 0.5) for d = 0..255.

    >>> softmax_table(0.5)[:3]
    array([1048576,  635993,  385750], dtype=int32)
    """
    d = np.arange(256, dtype=np.float64)
    return np.asarray(np.floor(np.exp(-d * float(scale)) * 2.0**20 + 0.5).astype(np.int32))


def softmax_integers(x: Array, table: Array) -> Array:
    """Return int64 softmax over the last axis, unit 1/256: min(255, (e * 256 + (sum >> 1)) // sum).

    x: (..., classes) integers of 8 bits; table: softmax_table(scale of x).
    """
    x = x.astype(np.int64)
    e = table.astype(np.int64)[x.max(axis=-1, keepdims=True) - x]
    total = e.sum(axis=-1, keepdims=True)
    return np.asarray(np.minimum(255, (e * 256 + (total >> 1)) // total))


def storage(fmt: Format) -> str:
    """Return the name of the integer type that stores a format: int8, uint8 or int16.

    >>> storage(Format(4, False, (1.0,))), storage(Format(12, True, (1.0,)))
    ('uint8', 'int16')
    """
    if fmt.bits <= 8:
        return "int8" if fmt.signed else "uint8"
    if not fmt.signed:
        raise KnobError(f"an unsigned format of {fmt.bits} bits cannot be stored; 8 bits at most")
    return "int16"


def output_format(graph: Graph, name: str) -> Format | None:
    """Return the format of the integers that node `name` gives, or None.

    Its own; that of the activation fused into it; that of its input for operators that keep formats. Softmax
    always gives SOFTMAX_FORMAT.
    """
    node = graph[name]
    fused = graph.fused_into(name)
    if fused is not None:
        return output_format(graph, fused)
    if node.op == "softmax":
        return SOFTMAX_FORMAT
    if node.format is None and node.op in FORMAT_KEEPING:
        inner = node.inputs[0]
        return None if graph.fused_into(inner) == name else output_format(graph, inner)
    return node.format


def output_limits(graph: Graph, name: str) -> tuple[int, int]:
    """Return (low, high): the integers that node `name` can give, from its format and the ReLUs on the way.

    Raises KnobError when it has no format.
    """
    fmt = output_format(graph, name)
    if fmt is None:
        raise KnobError(f"node '{name}' (module '{graph[name].module}') has no format")
    fused = graph.fused_into(name)
    if fused is not None:
        return clamp_limits(fmt, graph[fused].op)
    node = graph[name]
    if node.op in ("relu", "relu6"):
        limits = clamp_limits(fmt, node.op)
        if node.format is None:  # it keeps the format of its input
            inner = output_limits(graph, node.inputs[0])
            return min(max(inner[0], limits[0]), limits[1]), min(inner[1], limits[1])
        return limits
    if node.op in FORMAT_KEEPING and node.format is None:
        return output_limits(graph, node.inputs[0])
    return clamp_limits(fmt)


def _like(acc: Any, values: Array) -> Any:
    """Return int64 values as what `acc` is: an array, or a tensor on its device."""
    if isinstance(acc, np.ndarray | np.generic):
        return values
    return acc.new_tensor(values.tolist())


def _exponent(scale: float) -> int:
    return math.frexp(scale)[1] - 1


def _scale_of(magnitude: float, bits: int, power_of_two: bool) -> float:
    if power_of_two:
        return arith.power_of_two_scale(magnitude, bits)
    return (magnitude if magnitude > 0 else 1.0) / ((1 << (bits - 1)) - 1)


def _bias_units(bias: npt.ArrayLike, in_scale: float, weight_scales: Sequence[float]) -> Array:
    unit = float(in_scale) * np.asarray(weight_scales, dtype=np.float64)
    return np.asarray(np.floor(np.asarray(bias, dtype=np.float64) / unit + 0.5))


def _fill(weight: Array, bias: Array, fmt: Format, inputs: tuple[float, int, int], scaling: Requant) -> Array:
    """Return for each output channel how much of int32 its accumulator may take; above 1 is too much."""
    in_scale, low, high = inputs
    b = _bias_units(bias, in_scale, fmt.scale)
    least, greatest = acc_bound(weight_integers(weight, fmt), np.zeros(len(weight), np.int64), low, high)
    gain = 2.0**scaling.left_shift
    top, bottom = (greatest + b.clip(0) + scaling.half) * gain, (least + b.clip(None, 0)) * gain
    return np.asarray(np.maximum(np.maximum(top, np.abs(b)) / INT32_MAX, -bottom / 2.0**31))


def _reach(weight: Array, bias: Array, inputs: tuple[float, int, int]) -> float:
    """Return the largest real magnitude that any sum may take."""
    in_scale, low, high = inputs
    w = np.abs(weight.astype(np.float64)).reshape(len(weight), -1)
    return float((w.sum(axis=1) * in_scale * max(-low, high) + np.abs(bias)).max())
