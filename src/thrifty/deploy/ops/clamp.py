"""ReLU and ReLU6 that stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CCall, limits, suffix
from thrifty.deploy.ops.builder import Builder
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import clamped
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.ops.rescale import rescaled
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Clamp(Operator):
    """y = clamp(x, low, high)."""

    name = "clamp"
    lowers: ClassVar[tuple[str, ...]] = ("relu", "relu6")

    def lower(self, node: Node, b: Builder) -> None:
        """Append a clamp call; a rescale where the activation has a format of its own."""
        x = b.source(node)
        if b.integers and x.format != b.format(node):
            b.finish(node, rescaled(node, b, x))
            return
        low, high = b.limits(node)
        if x.format is not None:
            low, high = integer.clamp_limits(x.format, node.op)
        value = b.call("clamp", node, [x], x.shape, {"low": low, "high": high}, format=x.format)
        limits = (min(max(x.low, low), high), min(x.high, high))
        b.finish(node, replace(value, low=limits[0], high=limits[1], flat_of=x.flat_of))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Cut both sides."""
        return clamped(inputs[0], call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_clamp_*."""
        y = program.buffers[call.output]
        return CCall(f"thrifty_clamp_{suffix(y)}($x, $y, {y.size}, {limits(call, y.dtype)});", ("clamp.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a ReLU or ReLU6 on the input."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))), signed=True)
        return e.graph(e.unary(x, str(rng.choice(["relu", "relu6"]))))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input."""
        return (0,)
