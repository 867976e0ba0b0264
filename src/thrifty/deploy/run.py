"""Run a program in NumPy: the meaning of its arithmetic, to which C and Verilog are compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from thrifty import arith
from thrifty.arith import Format
from thrifty.deploy.ops import OPS
from thrifty.deploy.program import Array, Buffer, Program
from thrifty.errors import DataError

BATCH = 64  # examples at a time: what fits the caches


@dataclass(frozen=True)
class Saturation:
    """How many outputs of a call, over all examples, lie at a limit of their format."""

    low: int  # at the lowest integer; 0 after a ReLU, whose zeros are meant
    high: int
    size: int  # number of outputs


@overload
def run(program: Program, x: npt.ArrayLike, trace: Literal[False] = False) -> Array: ...


@overload
def run(program: Program, x: npt.ArrayLike, trace: Literal[True]) -> dict[str, Array]: ...


def run(program: Program, x: npt.ArrayLike, trace: bool = False) -> Array | dict[str, Array]:
    """Return the output (n, H, W, C) for inputs (n, H, W, C); with trace, every buffer by name.

    x: what the input buffer holds (integers, or float32), in its type or one that converts without loss.
    Raises DataError when the shape or a value does not fit the input buffer.
    """
    x = _fitting(np.asarray(x), program.buffers[program.input])
    if not len(x):
        empty = {name: np.empty((0, *b.shape), b.dtype) for name, b in program.buffers.items()}
        return empty if trace else empty[program.output]
    last = {} if trace else _last_readers(program)
    starts = range(0, len(x), BATCH)
    chunks = [_run_batch(program, x[start : start + BATCH], last) for start in starts]
    if trace:
        return {name: np.concatenate([c[name] for c in chunks]) for name in program.buffers}
    return np.concatenate([c[program.output] for c in chunks])


def quantize_input(program: Program, x_real: npt.ArrayLike) -> Array:
    """Return reals in PyTorch's layout as what the input buffer holds, (n, H, W, C).

    x_real: (n, C, H, W), (n, C, L) or (n, F). Rounding as arith.quantize; float32 programs change
    layout only. Raises DataError on another shape, NaN, or what is no array of numbers.
    """
    x = _reals(x_real)
    buffer = program.buffers[program.input]
    h, w, c = buffer.shape
    shapes = {4: (c, h, w), 3: (c, w), 2: (c,)}
    usable = x.ndim in shapes and (x.ndim == 4 or h == 1) and (x.ndim > 2 or w == 1)
    if not usable or x.shape[1:] != shapes[x.ndim]:
        raise DataError(
            f"the input has shape {x.shape}; '{program.name}' takes (n, channels, ...): {c} channels, "
            f"{h} x {w} positions"
        )
    if np.isnan(x).any():
        raise DataError(f"the input has {int(np.isnan(x).sum())} NaN values; '{program.name}' takes numbers")
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)).reshape(len(x), h, w, c)
    fmt = _format(buffer)
    return x if fmt is None else arith.quantize(x, fmt).astype(buffer.dtype)


def dequantize(program: Program, name: str, values: Array) -> Array:
    """Return the reals that a buffer's contents stand for, float32 in PyTorch's layout.

    values: (n, H, W, C). A (1, 1, C) buffer gives (n, C), any other (n, C, H, W); int32 (argmax) is kept.
    """
    buffer = program.buffers[name]
    fmt = _format(buffer)
    real = values if fmt is None else arith.dequantize(values, fmt)
    if buffer.shape[:2] == (1, 1):
        return real.reshape(len(real), buffer.shape[2])
    return np.ascontiguousarray(np.moveaxis(real, -1, 1))


def predict(program: Program, x_real: npt.ArrayLike) -> Array:
    """Quantise, run, dequantise: float32 reals (n, classes), or a map in PyTorch's layout.

    x_real: as in quantize_input. A program that ends in argmax gives int64 (n,).
    """
    y = dequantize(program, program.output, run(program, quantize_input(program, x_real)))
    if program.buffers[program.output].dtype == "int32":
        return y.reshape(-1).astype(np.int64)
    return y[:, :, 0] if np.ndim(x_real) == 3 and y.ndim == 4 and y.shape[2] == 1 else y


def saturation(program: Program, buffers: Mapping[str, Array]) -> dict[str, Saturation]:
    """Return for each call that clamps integers how often it did, from the buffers of a traced run.

    An output that lies at the limit without having been cut counts too.
    """
    found = {}
    for call in program.calls:
        out = buffers[call.output]
        if "low" in call.attrs and out.dtype.kind in "iu":
            low, high = call.attrs["low"], call.attrs["high"]
            at_low = int(np.count_nonzero(out == low)) if low < 0 else 0
            found[call.name] = Saturation(at_low, int(np.count_nonzero(out == high)), out.size)
    return found


def _run_batch(program: Program, x: Array, last: Mapping[str, int]) -> dict[str, Array]:
    """Return the buffers after a run; those that `last` gives a last reader are dropped behind it."""
    held = {program.input: x}
    for i, call in enumerate(program.calls):
        out = program.buffers[call.output]
        held[out.name] = OPS[call.op].compute(call, [held[n] for n in call.inputs], out)
        for name in set(call.inputs):
            if last.get(name) == i:
                del held[name]
    return held


def _last_readers(program: Program) -> dict[str, int]:
    """Return the index of the last call that reads each buffer, but for the output."""
    last = {name: i for i, call in enumerate(program.calls) for name in call.inputs}
    last.pop(program.output, None)
    return last


def _reals(x: npt.ArrayLike) -> Array:
    """Return float32; reals that are too large become infinite."""
    try:
        with np.errstate(over="ignore"):
            return np.asarray(x, dtype=np.float32)
    except (TypeError, ValueError) as err:
        raise DataError(f"the input is no array of numbers: {err}") from err


def _fitting(x: Array, buffer: Buffer) -> Array:
    if x.ndim != 4 or x.shape[1:] != buffer.shape:
        raise DataError(f"the input has shape {x.shape}; buffer '{buffer.name}' takes (n, *{buffer.shape})")
    if x.dtype.kind not in "biuf":
        raise DataError(f"the input is {x.dtype}; buffer '{buffer.name}' takes {buffer.dtype}")
    with np.errstate(invalid="ignore", over="ignore"):
        held = x.astype(buffer.dtype)
    if buffer.dtype != "float32" and not np.array_equal(held, x):
        raise DataError(f"the input has values outside {buffer.dtype}; quantize_input makes them from reals")
    return held


def _format(buffer: Buffer) -> Format | None:
    """Return the format of a buffer of small integers, else None."""
    bits = {"int8": 8, "uint8": 8, "int16": 16}.get(buffer.dtype)
    return Format(bits, buffer.dtype != "uint8", (buffer.scale,)) if bits else None
