"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops import weighted
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import integer_product, requantised
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Linear(Operator):
    """acc = bias + weight x; behind a flatten the weights are put in the (H, W, C) order of the map."""

    name = "linear"
    lowers: ClassVar[tuple[str, ...]] = ("linear",)
    attrs: ClassVar[frozenset[str]] = frozenset({"rounding"})

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Refuse odd weight formats."""
        yield from weighted.refuse_weights(node)

    def lower(self, node: Node, b: Builder) -> None:
        """Append a linear call."""
        x, weight = b.source(node), node.constants["weight"]
        if x.flat_of is not None:
            h, w, c = x.flat_of
            weight = weight.reshape(len(weight), c, h, w).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        attrs, constants = weighted.constants(node, b, x, weight, node.constants.get("bias"), node.weight_format)
        fmt = b.format(node) if b.integers else None
        macs = int(weight.size)
        b.finish(node, b.call("linear", node, [x], hwc(node.shape), attrs, constants, format=fmt, macs=macs))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Multiply the inputs, one a row, by the weights."""
        w, bias = call.constants["weight"], call.constants["bias"]
        x = inputs[0].reshape(len(inputs[0]), -1)
        if out.dtype == "float32":
            acc = np.broadcast_to(bias, (len(x), len(w))).astype(np.float32)
            for k in range(w.shape[1]):
                acc += x[:, k, None] * w[:, k]
        else:
            acc = integer_product(x, w.T) + bias.astype(np.int64)
        return requantised(acc.reshape(len(x), 1, 1, -1), call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call the kernel that pack chooses."""
        return weighted.kernel(call, program)

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a linear layer on a vector or on a flattened map."""
        e = Example(rng, kind)
        vector = rng.random() < 0.5
        shape = (int(rng.integers(1, 70)),) if vector else e.map_shape(channels=int(rng.integers(1, 6)))
        x = e.input(shape)
        return e.graph(e.activation(e.linear(e.flat(x), int(rng.integers(1, 14)))))
