"""Constants of conv, depthwise and linear calls in the form that the C kernels read.

`pack` takes a call as the program states it (weights in their logical layout) and returns everything that C
needs: the kernel to call, its constants as C text, how much scratch memory it wants. `choose` names the kernel
alone. How the packed words are laid out is told in kernels/block.h, conv.h, linear.h and depthwise.h; this is
their other half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.arith import INT32_MAX, INT32_MIN
from thrifty.deploy.c.kernel import Kernel, Members
from thrifty.deploy.c.layer import Form, Layer, inner_form, layer_of
from thrifty.deploy.c.stream import Window, runs_of, stream_of, window_of
from thrifty.deploy.c.text import c_float
from thrifty.deploy.program import Buffer, Call
from thrifty.errors import UnsupportedModel

Array = npt.NDArray[Any]

LANES = 3  # windows that the pair kernel computes together: THRIFTY_LANES in kernels/block.h
MAX_TILE = 16  # pixels of a tile: THRIFTY_MAX_PIXELS in kernels/block.h
TOLERANCE = 1.01  # a smaller row buffer may cost this much more than the fastest one
PAIR_STEP = {"W8": 19, "W16": 16, "W4": 39, "W4X": 47}  # instructions of an inner step
FOUR_STEP = {"W8": 18, "W16": 11, "W4": 35, "W4X": 51}
SHORT = {"int8": "s8", "uint8": "u8", "int16": "s16"}
MOST = 65535  # sizes are 16-bit numbers in the structs


def pack(call: Call, x: Buffer, y: Buffer, isa: str = "dsp") -> Kernel:
    """Return the kernel of a conv, depthwise or linear call with its packed constants.

    x, y: the buffers that it reads and writes; isa: "dsp" (Cortex-M4, M7, M33) or "portable".
    Raises UnsupportedModel when a size does not fit the kernels.
    """
    variant = choose(call, x, y, isa)
    kernel = _float(call, x, y) if variant == "float" else VARIANTS[variant](layer_of(call, x, y))
    if kernel.largest > MOST:
        clause = f"{call.name} takes a size of {kernel.largest} in its C kernel, which holds up to {MOST}"
        raise UnsupportedModel([f"{clause}; use fewer channels or a smaller input"])
    return kernel


def choose(call: Call, x: Buffer, y: Buffer, isa: str = "dsp") -> str:
    """Return the kernel variant for a call: a name of VARIANTS, or "float".

    All variants serve all cores with the same constants, so `isa` changes nothing yet.
    """
    if x.dtype == "float32":
        return "float"
    layer = layer_of(call, x, y)
    form = inner_form(layer)
    if form is None or layer.groups > 1:
        if form is None or not _is_depthwise(layer):
            return "generic"
        return "depthwise" if layer.stride == (1, 1) else "depthwise_stride2"
    return "conv" if _tile(layer, form)[1] < _linear_cost(layer, form) else "linear"


# ---- what a choice costs (instructions on Cortex-M4, near enough to compare) ----


def _fill_cost(layer: Layer, window: Window, tile: int) -> float:
    run, runs, _ = runs_of(layer, window, tile)
    kh, channels = int(layer.weight.shape[1]), int(layer.weight.shape[3])
    each = {"SWIZZLED": 1.5, "WORDS": 1.2, "TRIPLES": 2.5, "NATURAL": 4.0}[window.fill] * channels
    return 40 + runs * (10 + kh * (20 + run * (each + (8 if kh > 1 else 0))))


def _pairs_cost(layer: Layer, form: Form, window: Window, tile: int) -> float:
    height, width, channels = layer.out_shape
    groups = -(-height * -(-width // tile) // LANES)
    pair = 38 + window.steps * PAIR_STEP[form.weights] + 3 * -(-window.steps // 4)
    single = (60 + window.steps * (PAIR_STEP[form.weights] * 0.8)) * (channels % 2)
    return groups * (150 + LANES * _fill_cost(layer, window, tile) + tile * (20 + channels // 2 * pair + single))


def _linear_cost(layer: Layer, form: Form) -> float:
    window = window_of(layer, form.weights)
    height, width, channels = layer.out_shape
    four = 24 + window.steps * FOUR_STEP[form.weights] + 2 * -(-window.steps // 4)
    single = 50 + window.steps * 9
    return height * width * (60 + _fill_cost(layer, window, 1) + channels // 4 * four + channels % 4 * single)


def _lane_words(layer: Layer, window: Window, tile: int) -> int:
    run, runs, _ = runs_of(layer, window, tile)
    return max(run * runs * window.column // 2, (tile - 1) * window.advance + window.window_words)


def _tile(layer: Layer, form: Form) -> tuple[int, float]:
    """Return the pixels of a tile and the cost: the smallest buffer that is nearly as fast as the fastest."""
    window = window_of(layer, form.weights)
    costs = {tile: _pairs_cost(layer, form, window, tile) for tile in range(1, min(layer.out_shape[1], MAX_TILE) + 1)}
    tile = next(t for t, cost in costs.items() if cost <= TOLERANCE * min(costs.values()))
    return tile, costs[tile]


# ---- the variants ----


def _shape_members(layer: Layer) -> Members:
    return [("out_h", layer.out_shape[0]), ("out_w", layer.out_shape[1]), ("stride_h", layer.stride[0]),
            ("stride_w", layer.stride[1]), ("top", layer.pad[0]), ("left", layer.pad[2]),
            ("channels", layer.out_shape[2])]  # fmt: skip


def _finish_members(layer: Layer, form: Form) -> str:
    return f"{{{INT32_MAX - layer.high}, {_number(INT32_MIN - layer.low)}, {form.shift}}}"


def _number(value: int) -> str:
    return "INT32_MIN" if value == INT32_MIN else str(value)


def _rows_members(layer: Layer, window: Window, tile: int) -> tuple[int, ...]:
    run, runs, jump = runs_of(layer, window, tile)
    return (*layer.in_shape, layer.weight.shape[1], window.column, run, runs, jump)


def _fill(layer: Layer, window: Window, lanes: int) -> tuple[str, str]:
    """Return (name, instance) of the function that fills a row buffer."""
    short = SHORT[layer.in_type]
    name = f"thrifty_fill_{short}_{window.fill}_{lanes}".lower()
    if window.fill == "TRIPLES":
        return name, f"THRIFTY_FILL_TRIPLES({name}, {short}, {lanes})"
    return name, f"THRIFTY_FILL({name}, {short}, {window.fill}, {lanes})"


def _conv(layer: Layer) -> Kernel:
    form = inner_form(layer)
    assert form is not None
    window, (tile, _) = window_of(layer, form.weights), _tile(layer, form)
    stream, pair_words = stream_of(layer, form, window, 2)
    fill, fill_instance = _fill(layer, window, LANES)
    channels, lane_words = layer.out_shape[2], _lane_words(layer, window, tile)
    parts = f"thrifty_{form.name}, {form.weights}, {form.requant}, {form.store}"
    instances = [fill_instance]
    instances += [f"THRIFTY_PAIRS({parts})"] if channels > 1 else []
    instances += [f"THRIFTY_SINGLE({parts}, {LANES})"] if channels % 2 else []
    numbers: Members = [*_shape_members(layer), ("pair_words", str(pair_words)), ("tile", tile),
               ("steps", window.steps),
               ("window_words", window.window_words), ("advance", window.advance), ("lane_words", lane_words),
               ("pixel_bytes", channels * _item(layer))]  # fmt: skip
    members: Members = [
        ("stream", "{name}_stream"),
        ("fill", fill),
        ("pairs", f"thrifty_{form.name}_pairs" if channels > 1 else "NULL"),
        ("single", f"thrifty_{form.name}_single{LANES}" if channels % 2 else "NULL"),
        ("finish", _finish_members(layer, form)),
        ("rows", _rows_members(layer, window, tile)),
        *numbers,
    ]
    arrays = (("stream", "uint32_t", stream),)
    return Kernel("conv", ("conv.h",), "thrifty_conv", "thrifty_conv_t", tuple(instances), arrays, tuple(members),
                  scratch_bytes=4 * LANES * lane_words, struct_bytes=76)  # fmt: skip


def _item(layer: Layer) -> int:
    return 2 if layer.out_type == "int16" else 1


def _linear(layer: Layer) -> Kernel:
    form = inner_form(layer)
    assert form is not None
    window = window_of(layer, form.weights)
    stream, four_words = stream_of(layer, form, window, 4)
    fill, fill_instance = _fill(layer, window, 1)
    channels = layer.out_shape[2]
    in_place = (
        layer.in_type == "int16"
        and layer.out_shape[:2] == (1, 1)
        and layer.weight.shape[1:3] == layer.in_shape[:2] == (1, 1)
        and window.window_words * 2 == layer.in_shape[2]
    )
    parts = f"thrifty_{form.name}, {form.weights}, {form.requant}, {form.store}"
    instances = [] if in_place else [fill_instance]
    instances += [f"THRIFTY_FOURS({parts})"] if channels >= 4 else []
    instances += [f"THRIFTY_SINGLE({parts}, 1)"] if channels % 4 else []
    numbers: Members = [*_shape_members(layer), ("four_words", str(four_words)), ("steps", window.steps),
               ("window_words", window.window_words), ("item_bytes", _item(layer))]  # fmt: skip
    members: Members = [
        ("stream", "{name}_stream"),
        ("fill", "NULL" if in_place else fill),
        ("fours", f"thrifty_{form.name}_fours" if channels >= 4 else "NULL"),
        ("single", f"thrifty_{form.name}_single1" if channels % 4 else "NULL"),
        ("finish", _finish_members(layer, form)),
        ("rows", _rows_members(layer, window, 1)),
        *numbers,
    ]
    arrays = (("stream", "uint32_t", stream),)
    scratch = 0 if in_place else 4 * _lane_words(layer, window, 1)
    return Kernel("linear", ("linear.h",), "thrifty_linear", "thrifty_linear_t", tuple(instances), arrays,
                  tuple(members), scratch, 72)  # fmt: skip


DEPTHWISE_WORDS = 1024  # of a buffer that holds all the rows of a map at once


def _is_depthwise(layer: Layer) -> bool:
    channels, kh, kw, one = layer.weight.shape
    return (
        layer.groups == channels == layer.in_shape[2] >= 4
        and (kh, kw, one) == (3, 3, 1)
        and layer.stride in ((1, 1), (2, 2))
    )


def _depthwise_stream(layer: Layer, form: Form, order: list[list[int]]) -> Array:
    """Return words (C, words): bias, multiplier, then each column of the filter as two words of two taps.

    order: which tap, 3 for none, is the low and the high half of each word. 8-bit words are stored in one.
    """
    w = np.pad(layer.weight[..., 0].transpose(0, 2, 1), ((0, 0), (0, 0), (0, 1)))  # (C, kx, ky and a zero)
    halves = w[..., order].astype(np.uint32)  # (C, kx, word, half)
    if form.weights == "W8":
        places = np.array([[0, 16], [8, 24]], dtype=np.uint32)
        taps = np.bitwise_or.reduce((halves & 0xFF) << places, axis=(-2, -1))
    else:
        taps = ((halves[..., 0] & 0xFFFF) | halves[..., 1] << 16).reshape(len(w), -1)
    ends = [form.bias.astype(np.int32).view(np.uint32)]
    ends += [form.multiplier.astype(np.uint32)] if form.multiplier is not None else []
    return np.concatenate([np.stack(ends, axis=1), taps], axis=1).astype(np.uint32)


def _depthwise_form(layer: Layer) -> Form:
    form = inner_form(replace(layer, weight_bits=max(8, layer.weight_bits)))  # 4-bit weights are stored in 8
    assert form is not None
    return form


def _depthwise_numbers(layer: Layer, stream: Array, columns: int, buffer_rows: int) -> Members:
    height, width, channels = layer.out_shape
    return [("in_h", layer.in_shape[0]), ("in_w", layer.in_shape[1]), ("channels", channels), ("out_h", height),
            ("out_w", width), ("top", layer.pad[0]), ("left", layer.pad[2]), ("out_bytes", _item(layer)),
            ("channel_words", stream.shape[1]), ("columns", columns), ("buffer_rows", buffer_rows)]  # fmt: skip


def _depthwise(layer: Layer) -> Kernel:
    form = _depthwise_form(layer)
    stream = _depthwise_stream(layer, form, [[0, 1], [1, 2]])
    pairs, columns = -(-layer.out_shape[0] // 2), layer.out_shape[1] + 2  # of output rows; of the buffer
    whole = pairs > 1 and pairs * columns * 8 <= DEPTHWISE_WORDS
    buffer_rows = pairs if whole else 2
    short, bits = SHORT[layer.in_type], "16" if layer.in_type == "int16" else "8"
    four, rows = f"thrifty_depthwise_four_{short}", f"thrifty_depthwise_{form.name}"
    instances = (f"THRIFTY_DEPTHWISE_FOUR({four}, {short}, {bits})",
                 f"THRIFTY_DEPTHWISE({rows}, {form.weights}, {form.requant}, {form.store})")  # fmt: skip
    members: Members = [("stream", "{name}_stream"), ("four", four), ("rows", rows),
               ("finish", _finish_members(layer, form)), ("together", pairs if whole else 1),
               *_depthwise_numbers(layer, stream, columns, buffer_rows)]  # fmt: skip
    arrays = (("stream", "uint32_t", stream.reshape(-1)),)
    return Kernel("depthwise", ("depthwise.h",), "thrifty_depthwise", "thrifty_depthwise_t", instances, arrays,
                  tuple(members), scratch_bytes=32 * columns * buffer_rows, struct_bytes=52)  # fmt: skip


def _depthwise_stride2(layer: Layer) -> Kernel:
    form = _depthwise_form(layer)
    stream = _depthwise_stream(layer, form, [[0, 1], [2, 3]])
    height, columns = layer.out_shape[0], 2 * layer.out_shape[1] + 1
    buffer_rows = height + 1 if height > 1 and (height + 1) * columns * 4 <= DEPTHWISE_WORDS else 2
    short, bits = SHORT[layer.in_type], "16" if layer.in_type == "int16" else "8"
    multipliers = int(form.multiplier is not None)
    four = f"thrifty_dw2_four_{short}_{form.weights}_{multipliers}".lower()
    rows = f"thrifty_dw2_{form.requant}_{form.store}".lower()
    instances = (f"THRIFTY_DW2_FOUR({four}, {short}, {bits}, {form.weights}, {multipliers})",
                 f"THRIFTY_DEPTHWISE_STRIDE2({rows}, {form.requant}, {form.store})")  # fmt: skip
    members: Members = [("stream", "{name}_stream"), ("four", four), ("rows", rows),
               ("finish", _finish_members(layer, form)),
               *_depthwise_numbers(layer, stream, columns, buffer_rows)]  # fmt: skip
    arrays = (("stream", "uint32_t", stream.reshape(-1)),)
    return Kernel("depthwise_stride2", ("depthwise_stride2.h",), "thrifty_depthwise_stride2", "thrifty_dw2_t",
                  instances, arrays, tuple(members), scratch_bytes=128 + 16 * columns * buffer_rows,
                  struct_bytes=48)  # fmt: skip


def _nibbles(weight: Array) -> Array:
    """Return (Co, bytes): two weights a byte, the first in the low nibble."""
    flat = weight.reshape(len(weight), -1)
    flat = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2))).astype(np.uint8) & 15
    return (flat[:, 0::2] | flat[:, 1::2] << 4).astype(np.uint8)


def _generic(layer: Layer) -> Kernel:
    channels, kh, kw, group_in = layer.weight.shape
    arrays: list[tuple[str, str, Array]] = []
    if layer.weight_bits <= 4:
        weights, arrays = "W4", [("weight", "uint8_t", _nibbles(layer.weight))]
    elif layer.weight_bits <= 8:
        weights, arrays = "W8", [("weight", "int8_t", layer.weight.astype(np.int8))]
    else:
        weights, arrays = "W16", [("weight", "int16_t", layer.weight.astype(np.int16))]
    arrays.append(("bias", "int32_t", layer.bias.astype(np.int32)))
    requant = "MULTIPLIER"
    if layer.requant == "multiplier":
        assert layer.multiplier is not None
        arrays.append(("multiplier", "int32_t", layer.multiplier.astype(np.int32)))
    else:
        requant = "HALF_UP" if layer.rounding == "half_up" else "FLOOR"
        shift = np.broadcast_to(np.array(layer.shift), (channels,))
        arrays.append(("shift", "int8_t", shift.clip(-32, 64).astype(np.int8)))
    has = {suffix for suffix, _, _ in arrays}
    name = f"thrifty_generic_{SHORT[layer.in_type]}_{weights}_{SHORT[layer.out_type]}".lower()
    numbers = [("low", str(layer.low)), ("high", str(layer.high)), ("pre_shift", str(layer.pre_shift)),
               *_shape_members(layer),
               ("in_h", layer.in_shape[0]), ("in_w", layer.in_shape[1]), ("in_c", layer.in_shape[2]), ("kernel_h", kh),
               ("kernel_w", kw), ("group_in", group_in), ("group_out", channels // layer.groups)]  # fmt: skip
    pointers = ("weight", "bias", "multiplier", "shift")
    members: Members = [(p, "{name}_" + p if p in has else "NULL") for p in pointers]
    members += [("requant", f"THRIFTY_REQUANT_{requant}"), *numbers]
    instance = f"THRIFTY_GENERIC({name}, {SHORT[layer.in_type]}, {weights}, {SHORT[layer.out_type]})"
    return Kernel(
        "generic",
        ("generic.h",),
        name,
        "thrifty_generic_t",
        (instance,),
        tuple(arrays),
        tuple(members),
        0,
        64,
    )


def _float(call: Call, x: Buffer, y: Buffer) -> Kernel:
    weight = np.asarray(call.constants["weight"], dtype=np.float32)
    bias = np.asarray(call.constants["bias"], dtype=np.float32)
    in_shape, out_shape, stride, pad, groups = x.shape, y.shape, (1, 1), (0, 0, 0, 0), 1
    if call.op == "linear":
        weight, in_shape, out_shape = weight[:, None, None, :], (1, 1, x.size), (1, 1, y.size)
    else:
        stride, pad = call.attrs["stride"], call.attrs["pad"]
        groups = call.attrs["groups"] if call.op == "conv" else 1
    if call.op == "depthwise":
        weight = weight.transpose(2, 0, 1)[..., None]
    channels, kh, kw, group_in = weight.shape
    flat, parts, each = weight.reshape(channels, -1), [], channels // groups
    for start in range(0, channels, each):
        full = start + each // 4 * 4
        blocks = [slice(i, i + 4) for i in range(start, full, 4)]
        blocks += [slice(i, i + 1) for i in range(full, start + each)]
        for block in blocks:
            parts += [bias[block], flat[block].T.reshape(-1)]
    numbers: Members = [("in_h", in_shape[0]), ("in_w", in_shape[1]), ("in_c", in_shape[2]), ("out_h", out_shape[0]),
               ("out_w", out_shape[1]), ("channels", channels), ("kernel_h", kh), ("kernel_w", kw),
               ("stride_h", stride[0]), ("stride_w", stride[1]), ("top", pad[0]), ("left", pad[2]),
               ("group_in", group_in), ("group_out", each)]  # fmt: skip
    members: Members = [("stream", "{name}_stream"), ("low", _float_text(call.attrs["low"])),
               ("high", _float_text(call.attrs["high"])), *numbers]  # fmt: skip
    function = f"thrifty_{call.op}_float"
    scratch = 16 * kh * kw * group_in if call.op == "conv" else 0
    arrays = (("stream", "float", np.concatenate(parts)),)
    return Kernel("float", ("conv_float.h",), function, "thrifty_float_t", (), arrays, tuple(members), scratch, 40)


def _float_text(value: float) -> str:
    return c_float(value) if np.isfinite(value) else ("" if value > 0 else "-") + "THRIFTY_INFINITY"


VARIANTS: Mapping[str, Callable[[Layer], Kernel]] = {
    "conv": _conv,
    "linear": _linear,
    "depthwise": _depthwise,
    "depthwise_stride2": _depthwise_stride2,
    "generic": _generic,
}
