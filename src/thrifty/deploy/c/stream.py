"""Row buffers, and weights in the order in which the inner kernels of conv.h and linear.h read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.layer import FACTOR, Form, Layer

Array = npt.NDArray[Any]

TAPS = {"W8": 4, "W16": 4, "W4": 8, "W4X": 8}  # of an inner step: kernels/block.h


@dataclass(frozen=True)
class Window:
    """The row buffer of some layer: rows.h."""

    fill: str  # SWIZZLED, WORDS, TRIPLES or NATURAL
    column: int  # elements of a column
    advance: int  # words of a lane from one window to the next
    steps: int  # inner steps of a window
    window_words: int  # of a lane


def window_of(layer: Layer, weights: str) -> Window:
    """Return how windows of a layer lie in a row buffer; weights: W8, W16, W4 or W4X."""
    _, kh, kw, channels = layer.weight.shape
    if layer.in_type == "int16":
        fill = "NATURAL" if channels % 2 else "WORDS"
    else:
        fill = "TRIPLES" if channels == 3 else "NATURAL" if channels % 4 else "SWIZZLED"
    column = kh * channels + kh * channels % 2
    steps = -(-kw * column // TAPS[weights])
    advance = min(layer.stride[1], kw) * column // 2
    return Window(fill, column, advance, steps, steps * TAPS[weights] // 2)


def runs_of(layer: Layer, window: Window, tile: int) -> tuple[int, int, int]:
    """Return (columns of a run, runs, columns from a run to the next) of a tile."""
    kw, stride = layer.weight.shape[2], layer.stride[1]
    return ((tile - 1) * stride + kw, 1, 0) if stride <= kw else (kw, tile, stride)


def _order(fill: str, kh: int, channels: int) -> Array:
    """Return which element [ky, channel] of an input column each element of a buffer column is, -1 for none."""
    natural = np.arange(kh * channels)
    if fill == "SWIZZLED":
        return natural.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)
    if fill == "TRIPLES":
        rows = natural.reshape(kh, 3)
        return np.concatenate([rows[:, [0, 2]].reshape(-1), rows[:, 1], [-1] * (kh % 2)])
    return np.concatenate([natural, [-1] * (natural.size % 2)])


def _ordered(layer: Layer, window: Window, taps: int) -> Array:
    """Return weights (Co, taps of all steps) in the order of the row buffer, zeros where it has slack."""
    count, kh, kw, channels = layer.weight.shape
    order = _order(window.fill, kh, channels).astype(np.int64)
    columns = layer.weight.transpose(0, 2, 1, 3).reshape(count, kw, kh * channels)
    ordered = np.zeros((count, window.steps * taps), dtype=np.int64)
    ordered[:, : kw * window.column] = np.where(order < 0, 0, columns[:, :, order]).reshape(count, -1)
    return ordered


def _words(ordered: Array, weights: str) -> Array:
    """Return (Co, words) of weights as a step wants them."""
    bits = ordered.astype(np.uint32)  # two's complement
    if weights == "W16":
        pairs = bits.reshape(len(bits), -1, 2) & 0xFFFF
        both: Array = (pairs[..., 0] | pairs[..., 1] << 16).astype(np.uint32)
        return both
    if weights == "W8":
        places, mask = np.array([0, 16, 8, 24]), 0xFF
    else:
        places, mask = np.array([12, 28, 8, 24, 4, 20, 0, 16]), 0xF
    groups = (bits.reshape(len(bits), -1, len(places)) & mask) << places.astype(np.uint32)
    words: Array = np.bitwise_or.reduce(groups, axis=-1).astype(np.uint32)
    return words


def stream_of(layer: Layer, form: Form, window: Window, together: int) -> tuple[Array, int]:
    """Return the packed constants, and how many words of them are for full blocks of `together` channels."""
    words = _words(_ordered(layer, window, TAPS[form.weights]), form.weights)
    bias = (form.bias << FACTOR[form.weights]).astype(np.int32).view(np.uint32)
    parts: list[Array] = []
    full = len(words) // together * together
    blocks = [slice(i, i + together) for i in range(0, full, together)] + [
        slice(i, i + 1) for i in range(full, len(words))
    ]
    for block in blocks:
        parts += [bias[block], words[block].T.reshape(-1)]
        if form.multiplier is not None:
            parts.append(form.multiplier[block].astype(np.uint32))
    size = words.shape[1] + 1 + (form.multiplier is not None)
    return np.concatenate(parts).astype(np.uint32), full * size
