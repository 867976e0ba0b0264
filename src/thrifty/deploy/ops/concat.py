"""Concatenation along any axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from thrifty import arith
from thrifty.deploy.c.ccall import CCall, limits, suffix
from thrifty.deploy.ops.add import sum_constants
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import clamped
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node

# Axis of (H, W, C) for each axis of a channels-first shape, by number of axes.
AXES = {1: (2,), 2: (2, 1), 3: (2, 0, 1)}


class Concat(Operator):
    """y = for each input k: clamp(round_shift(x_k * multipliers[k], shift), low, high)."""

    name = "concat"
    lowers: ClassVar[tuple[str, ...]] = ("concat",)
    attrs: ClassVar[frozenset[str]] = frozenset({"axis"})

    def lower(self, node: Node, b: Builder) -> None:
        """Append a concat call."""
        inputs = [b.source(node, k) for k in range(len(node.inputs))]
        low, high = b.limits(node)
        fmt, multipliers, shift = None, (1,) * len(inputs), 0
        if b.integers:
            fmt = b.format(node)
            multipliers, shift = sum_constants(inputs, fmt.scale[0])
        axis = AXES[len(node.shape)][node.attrs["axis"]]
        attrs = {"axis": axis, "multipliers": multipliers, "shift": shift, "low": low, "high": high}
        b.finish(node, b.call("concat", node, inputs, hwc(node.shape), attrs, format=fmt))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Bring each to the scale of the output and join them."""
        axis = call.attrs["axis"] + 1
        if out.dtype == "float32":
            return clamped(np.concatenate(inputs, axis=axis), call, out)
        parts = [
            arith.round_shift(x.astype(np.int64) * m, call.attrs["shift"])
            for x, m in zip(inputs, call.attrs["multipliers"])
        ]
        return clamped(np.concatenate(parts, axis=axis), call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_rescale_* for each input: it fills its part of every run of the output."""
        y, axis, start, lines = program.buffers[call.output], call.attrs["axis"], 0, []
        stride = math.prod(y.shape[axis:])
        for k, name in enumerate(call.inputs):
            x = program.buffers[name]
            inner = math.prod(x.shape[axis:])
            place = f"$x{k}, $y + {start}, {x.size // inner}, {inner}, {stride}"
            if y.dtype != "float32":
                place += f", {call.attrs['multipliers'][k]}, {call.attrs['shift']}"
            lines.append(f"thrifty_rescale_{suffix(x, y)}({place}, {limits(call, y.dtype)});")
            start += inner
        return CCall("\n".join(lines), ("rescale.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return x joined with maps made from it, along a random axis."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 6))))
        axis = int(rng.integers(0, len(e.shape(x))))
        others = [e.changed(x) for _ in range(int(rng.integers(1, 3)))]
        if axis == 0:
            others.append(e.conv(x, int(rng.integers(1, 5)), kernel=1))
        return e.graph(e.activation(e.concat([x, *others], axis)))
