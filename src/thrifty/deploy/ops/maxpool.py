"""Largest element of each window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CCall, limits, suffix
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import clamped, windows
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.ops.rescale import rescaled
from thrifty.deploy.ops.spatial import borders, covering, pair, pool_struct
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class MaxPool(Operator):
    """y = clamp(max over the window, low, high); windows are cut at the border of the map."""

    name = "maxpool"
    lowers: ClassVar[tuple[str, ...]] = ("maxpool",)
    attrs: ClassVar[frozenset[str]] = frozenset({"kernel", "stride", "padding", "ceil"})

    def lower(self, node: Node, b: Builder) -> None:
        """Append a maxpool call, and a rescale where the pool has a format of its own."""
        x, shape = b.source(node), hwc(node.shape)
        kernel, stride = pair(node.attrs["kernel"]), pair(node.attrs["stride"])
        pad = covering(x.shape, shape, kernel, stride, borders(node.attrs["padding"]))
        low, high = b.limits(node)
        if x.format is not None:  # the pool's own format, if any, is that of the rescale
            fused = b.fused(node)
            low, high = integer.clamp_limits(x.format, fused.op if fused else None)
        attrs = {"kernel": kernel, "stride": stride, "pad": pad, "low": low, "high": high}
        value = b.call("maxpool", node, [x], shape, attrs, format=x.format)
        value = replace(value, low=min(max(x.low, low), high), high=min(x.high, high))
        if b.integers and x.format != b.format(node):
            value = rescaled(node, b, value)
        b.finish(node, value)

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Compare tap after tap, in (ky, kx) order."""
        a, x = call.attrs, inputs[0]
        lowest = -np.inf if out.dtype == "float32" else np.iinfo(x.dtype).min
        view = windows(x, a["kernel"], a["stride"], a["pad"], (out.shape[0], out.shape[1]), lowest)
        best = np.full(view.shape[:3] + view.shape[5:], lowest, dtype=x.dtype)
        for ky in range(a["kernel"][0]):
            for kx in range(a["kernel"][1]):
                tap = view[:, :, :, ky, kx]
                best = np.where(tap > best, tap, best)
        return clamped(best, call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_maxpool_*."""
        y = program.buffers[call.output]
        text = f"thrifty_maxpool_{suffix(y)}(&$pool, $x, $y, {limits(call, y.dtype)});"
        return CCall(text, ("pool.h",), {"pool": pool_struct(call, program)})

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a max pool of random window, sometimes with an activation behind it."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))))
        return e.graph(e.activation(e.pool(x, "maxpool")))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input, without padding above or to the left: no output then lies before its window."""
        return (0,) if call.attrs["pad"][0] == call.attrs["pad"][2] == 0 else ()
