"""Softmax over a vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CArray, CCall, suffix
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node

# exp(t) = 2^k * exp(r), r = t - k * ln 2 in two steps, exp(r) by its Taylor series.
PER_LN2 = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(0.693147180559945309 - 0.693359375)
TAYLOR = tuple(np.float32(1 / n) for n in (5040, 720, 120, 24, 6, 2, 1, 1))
LEAST = np.float32(-87.0)  # below it the result is 0


class Softmax(Operator):
    """Integers: e = table[max - x], y = min(255, (e * 256 + (sum >> 1)) // sum); float32: see `softmax32`."""

    name = "softmax"
    lowers: ClassVar[tuple[str, ...]] = ("softmax",)
    attrs: ClassVar[frozenset[str]] = frozenset({"axis"})
    kinds: ClassVar[tuple[str, ...]] = ("int8", "float32")

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Refuse long vectors and 16-bit inputs."""
        fmt = integer.output_format(graph, node.inputs[0])
        if fmt is None:
            return
        if fmt.bits > 8:
            yield f"its input has {fmt.bits} bits; use 8, or leave it out: the largest score stays so"
        if node.size > integer.SOFTMAX_LARGEST:
            yield f"it has {node.size} inputs; at most {integer.SOFTMAX_LARGEST} are supported"

    def lower(self, node: Node, b: Builder) -> None:
        """Append a softmax call."""
        x = b.source(node)
        constants, fmt = {}, None
        if x.format is not None:
            fmt = integer.SOFTMAX_FORMAT
            constants = {"table": b.shared(integer.softmax_table(b.scale_of(x)), "int32")}
        b.finish(node, b.call("softmax", node, [x], hwc(node.shape), {}, constants, format=fmt))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Compute over all elements of each example."""
        x = inputs[0].reshape(len(inputs[0]), -1)
        if out.dtype == "float32":
            y = softmax32(x)
        else:
            y = integer.softmax_integers(x, call.constants["table"]).astype(out.dtype)
        return y.reshape(len(x), *out.shape)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_softmax_*."""
        x = program.buffers[call.inputs[0]]
        if x.dtype == "float32":
            return CCall(f"thrifty_softmax_f32($x, $y, {x.size});", ("softmax.h",))
        table = CArray(call.constants["table"], note="exp(-d * scale), unit 2^-20")
        return CCall(f"thrifty_softmax_{suffix(x)}($x, $y, {x.size}, $table);", ("softmax.h",), {"table": table})

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a softmax on the input, a vector."""
        e = Example(rng, kind)
        return e.graph(e.unary(e.input((int(rng.integers(1, 40)),)), "softmax", {"axis": 0}))


def softmax32(x: Array) -> Array:
    """Return float32 softmax over the last axis: e = exp32(x - max), summed in order from 0, y = e / sum."""
    e = exp32(x - x.max(axis=-1, keepdims=True))
    total = np.add.accumulate(e, axis=-1, dtype=np.float32)[..., -1:]
    return np.asarray(e / total, dtype=np.float32)


def exp32(t: Array) -> Array:
    """Return exp(t) for float32 t <= 0 with float32 steps in a fixed order, within 2 units in the last place.

    k = floor(t * PER_LN2 + 0.5); r = (t - k * LN2_HIGH) - k * LN2_LOW; p = 1/7!, then p = p * r + 1/n! for
    n = 6..0; result p * 2^k. Below LEAST it is 0.
    """
    t = np.asarray(t, dtype=np.float32)
    safe = np.where(t < LEAST, LEAST, t)
    k = np.floor(safe * PER_LN2 + np.float32(0.5))
    r = (safe - k * LN2_HIGH) - k * LN2_LOW
    p = np.full_like(r, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        p = p * r + coefficient
    power = ((k.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(t < LEAST, np.float32(0), p * power).astype(np.float32)
