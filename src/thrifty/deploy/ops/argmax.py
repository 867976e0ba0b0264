"""Index of the largest element."""

from __future__ import annotations

from collections.abc import Sequence
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
