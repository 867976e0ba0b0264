"""Any function of one 8-bit integer, by table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CArray, CCall, suffix
from thrifty.deploy.ops.builder import Builder
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Lookup(Operator):
    """y = table[x - lowest x]; a float32 hard swish becomes `hardswish`."""

    name = "lookup"
    lowers: ClassVar[tuple[str, ...]] = ("hardswish",)
    kinds: ClassVar[tuple[str, ...]] = ("int8",)

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Refuse inputs and outputs of more than 8 bits."""
        formats = integer.output_format(graph, node.inputs[0]), integer.output_format(graph, node.name)
        if any(f is not None and f.bits > 8 for f in formats):
            yield "hardswish is a table of 8-bit inputs and outputs; with 16 bits use ReLU or ReLU6"

    def lower(self, node: Node, b: Builder) -> None:
        """Append a lookup call, or a hardswish one in a float program."""
        x = b.source(node)
        if x.format is None:
            value = b.call("hardswish", node, [x], x.shape, {})
        else:
            fmt = b.format(node)
            table = integer.lookup_table(integer.hardswish, x.format, fmt)
            constants = {"table": b.shared(table, integer.storage(fmt))}
            value = b.call("lookup", node, [x], x.shape, {}, constants, format=fmt)
        b.finish(node, replace(value, flat_of=x.flat_of))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Read the table."""
        lowest = -128 if inputs[0].dtype == np.int8 else 0
        return np.asarray(call.constants["table"][inputs[0].astype(np.int16) - lowest])

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_lookup_*."""
        x, y = program.buffers[call.inputs[0]], program.buffers[call.output]
        text = f"thrifty_lookup_{suffix(x, y)}($x, $y, {y.size}, $table);"
        return CCall(text, ("lookup.h",), {"table": CArray(call.constants["table"])})

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a hard swish on the input."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))))
        return e.graph(e.unary(x, "hardswish"))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input."""
        return (0,)
