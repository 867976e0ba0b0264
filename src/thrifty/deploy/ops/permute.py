"""Axes in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.concat import AXES
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.ops.rescale import rescaled
from thrifty.deploy.program import ITEM_BYTES, Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Permute(Operator):
    """y has the axes of x in another order; attrs axes, of (H, W, C), as in numpy.transpose."""

    name = "permute"
    lowers: ClassVar[tuple[str, ...]] = ("permute",)
    attrs: ClassVar[frozenset[str]] = frozenset({"axes"})

    def lower(self, node: Node, b: Builder) -> None:
        """Append a permute call, none when the order stays."""
        x, axes = b.source(node), hwc_axes(tuple(node.attrs["axes"]))
        value = x
        if axes != (0, 1, 2):
            value = b.call("permute", node, [x], hwc(node.shape), {"axes": axes}, format=x.format)
            value = replace(value, low=x.low, high=x.high)
        if b.integers and x.format != b.format(node):
            value = rescaled(node, b, value)
        b.finish(node, value)

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Transpose."""
        return np.ascontiguousarray(inputs[0].transpose(0, *(a + 1 for a in call.attrs["axes"])))

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_permute_*: the output in order, the input with the strides of its axes."""
        x, y = program.buffers[call.inputs[0]], program.buffers[call.output]
        strides = (x.shape[1] * x.shape[2], x.shape[2], 1)
        numbers = (*y.shape, *(strides[axis] for axis in call.attrs["axes"]))
        bits = 8 * ITEM_BYTES[y.dtype]
        return CCall(f"thrifty_permute_{bits}($x, $y, {', '.join(map(str, numbers))});", ("copy.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a random order of the axes."""
        e = Example(rng, kind)
        return e.graph(e.permute(e.input(e.map_shape(channels=int(rng.integers(1, 9))))))


def hwc_axes(axes: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the order of (H, W, C) that an order of channels-first axes means.

    >>> hwc_axes((1, 2, 0)), hwc_axes((1, 0))
    ((1, 2, 0), (0, 2, 1))
    """
    places = AXES[len(axes)]  # of each channels-first axis in (H, W, C)
    order = [0, 1, 2]
    for new, old in enumerate(axes):
        order[places[new]] = places[old]
    return order[0], order[1], order[2]
