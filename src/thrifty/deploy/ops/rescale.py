"""A change of format: where a node that keeps formats is given one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from thrifty import arith
from thrifty.deploy.c.ccall import CCall, limits, suffix
from thrifty.deploy.ops.add import sum_constants
from thrifty.deploy.ops.builder import Builder, Value
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import clamped
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Rescale(Operator):
    """y = clamp(round_shift(x * multipliers[0], shift), low, high); also what is left of an identity."""

    name = "rescale"
    lowers: ClassVar[tuple[str, ...]] = ("identity",)
    kinds: ClassVar[tuple[str, ...]] = ("int8", "int16")

    def lower(self, node: Node, b: Builder) -> None:
        """Append a call where the format changes; else the value of the input is that of the identity."""
        x = b.source(node)
        b.finish(node, rescaled(node, b, x) if b.integers and x.format != b.format(node) else x)

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Multiply and shift."""
        product = inputs[0].astype(np.int64) * call.attrs["multipliers"][0]
        return clamped(arith.round_shift(product, call.attrs["shift"]), call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_rescale_*, as one run of elements."""
        x, y = program.buffers[call.inputs[0]], program.buffers[call.output]
        scaling = f"{call.attrs['multipliers'][0]}, {call.attrs['shift']}, {limits(call, y.dtype)}"
        text = f"thrifty_rescale_{suffix(x, y)}($x, $y, 1, {y.size}, 0, {scaling});"
        return CCall(text, ("rescale.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return an identity that changes the format."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))))
        return e.graph(e.changed(x))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input."""
        return (0,)


def rescaled(node: Node, b: Builder, x: Value) -> Value:
    """Append a rescale of x to the format of `node` and return its value."""
    fmt = b.format(node)
    multipliers, shift = sum_constants([x], fmt.scale[0])
    low, high = b.limits(node)
    attrs = {"multipliers": multipliers, "shift": shift, "low": low, "high": high}
    name = node.name if node.op in ("identity", "relu", "relu6") else f"{node.name}_rescale"
    value = b.call("rescale", node, [x], x.shape, attrs, format=fmt, name="" if name == node.name else name)
    return replace(value, flat_of=x.flat_of)
