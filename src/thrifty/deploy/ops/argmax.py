"""Index of the largest element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from thrifty.deploy.c.ccall import CCall, suffix
from thrifty.deploy.ops.builder import Builder
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class ArgMax(Operator):
    """Index of the first largest element, int32 (1, 1, 1)."""

    name = "argmax"
    lowers: ClassVar[tuple[str, ...]] = ("argmax",)
    attrs: ClassVar[frozenset[str]] = frozenset({"axis", "keepdim"})

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Refuse maps, and an index that is computed with further."""
        shape = graph[node.inputs[0]].shape
        axis = node.attrs.get("axis", 0)
        if not shape or axis is None or shape[axis] != np.prod(shape):
            yield f"it runs along axis {axis} of shape {shape}; argmax is supported over a whole vector"
        if graph.consumers[node.name]:
            yield "its index is used by other operators; an argmax is supported as the last operator only"

    def lower(self, node: Node, b: Builder) -> None:
        """Append an argmax call."""
        b.finish(node, b.call("argmax", node, [b.source(node)], (1, 1, 1), {}, dtype="int32"))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Search."""
        x = inputs[0].reshape(len(inputs[0]), -1)
        return np.asarray(x.argmax(axis=1), dtype=np.int32).reshape(-1, 1, 1, 1)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_argmax_*."""
        x = program.buffers[call.inputs[0]]
        return CCall(f"thrifty_argmax_{suffix(x)}($x, $y, {x.size});", ("argmax.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return an argmax of the input, a vector."""
        e = Example(rng, kind)
        return e.graph(e.argmax(e.input((int(rng.integers(1, 40)),))))
