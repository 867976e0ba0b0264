"""The same elements, seen in another shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops.builder import Builder, Value
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.ops.rescale import rescaled
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node

ELEMENTWISE = frozenset({"relu", "relu6", "hardswish", "identity"})


class Copy(Operator):
    """y = x in another shape: flatten. At run time nothing, where the planner gives both the same memory."""

    name = "copy"
    lowers: ClassVar[tuple[str, ...]] = ("flatten",)

    def lower(self, node: Node, b: Builder) -> None:
        """Append a copy; before it a permute into (C, H, W) order where not only linear layers read it."""
        x = b.source(node)
        h, w, c = x.shape
        keeps_order = h * w == 1 or c == 1
        value = x
        if not keeps_order and not order_free(node.name, b.graph):
            turned = b.call("permute", node, [x], (c, h, w), {"axes": (2, 0, 1)}, format=x.format,
                            name=f"{node.name}_order")  # fmt: skip
            value, keeps_order = replace(turned, low=x.low, high=x.high), True
        value = self._reshaped(node, b, value)
        if not keeps_order:
            value = replace(value, flat_of=(h, w, c))
        if b.integers and x.format != b.format(node):
            value = rescaled(node, b, value)
        b.finish(node, value)

    @staticmethod
    def _reshaped(node: Node, b: Builder, x: Value) -> Value:
        shape = (1, 1, x.shape[0] * x.shape[1] * x.shape[2])
        if shape == x.shape:
            return x
        return replace(b.call("copy", node, [x], shape, {}, format=x.format), low=x.low, high=x.high)

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Reshape."""
        return inputs[0].reshape(len(inputs[0]), *out.shape)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_copy; no code where both have the same memory."""
        size = program.buffers[call.output].size_bytes
        return CCall(f"thrifty_copy($x, $y, {size});", ("copy.h",), free_in_place=True)

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a flattened map."""
        e = Example(rng, kind)
        return e.graph(e.flat(e.input(e.map_shape(channels=int(rng.integers(1, 9))))))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input: then nothing is to be done."""
        return (0,)


def order_free(name: str, graph: Graph) -> bool:
    """Whether every reader of a flattened map ends in linear layers, whose weights can take any order."""
    readers = graph.consumers[name]
    return name not in graph.outputs and all(
        graph[r].op == "linear" or (graph[r].op in ELEMENTWISE and order_free(r, graph)) for r in readers
    )
