"""Element-wise addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from thrifty import arith, integer
from thrifty.deploy.c.ccall import CCall, limits, suffix
from thrifty.deploy.ops.builder import Builder, Value, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import clamped
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Add(Operator):
    """y = clamp(round_shift(a * multipliers[0] + b * multipliers[1], shift), low, high)."""

    name = "add"
    lowers: ClassVar[tuple[str, ...]] = ("add",)

    def lower(self, node: Node, b: Builder) -> None:
        """Append an add call."""
        inputs = [b.source(node, 0), b.source(node, 1)]
        low, high = b.limits(node)
        fmt, shift = None, 0
        multipliers: tuple[int, ...] = (1, 1)
        if b.integers:
            fmt = b.format(node)
            multipliers, shift = sum_constants(inputs, fmt.scale[0])
        attrs = {"multipliers": multipliers, "shift": shift, "low": low, "high": high}
        b.finish(node, b.call("add", node, inputs, hwc(node.shape), attrs, format=fmt))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Bring both to a common scale, add, round once."""
        if out.dtype == "float32":
            return clamped(inputs[0] + inputs[1], call, out)
        first, second = (x.astype(np.int64) * m for x, m in zip(inputs, call.attrs["multipliers"]))
        return clamped(arith.round_shift(first + second, call.attrs["shift"]), call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_add_*."""
        a, b = (program.buffers[name] for name in call.inputs)
        y = program.buffers[call.output]
        arguments = f"$x0, $x1, $y, {y.size}"
        if y.dtype != "float32":
            arguments += f", {call.attrs['multipliers'][0]}, {call.attrs['multipliers'][1]}, {call.attrs['shift']}"
        end = "f32" if y.dtype == "float32" else suffix(a, b, y)
        return CCall(f"thrifty_add_{end}({arguments}, {limits(call, y.dtype)});", ("add.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return x plus x at another scale, or x plus itself."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))))
        return e.graph(e.activation(e.add(x, x if rng.random() < 0.1 else e.changed(x))))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow either input."""
        return 0, 1


def sum_constants(inputs: Sequence[Value], out_scale: float) -> tuple[tuple[int, ...], int]:
    """Return integer.add_constants for these values."""
    formats = [v.format for v in inputs if v.format is not None]
    return integer.add_constants([f.scale[0] for f in formats], out_scale, max(f.bits for f in formats))
