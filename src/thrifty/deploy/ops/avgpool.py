"""Mean of each window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CCall, CStruct, limits, suffix
from thrifty.deploy.c.text import c_float
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import requantised, scaling, windows
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.ops.spatial import borders, covering, pair, pool_struct
from thrifty.deploy.ops.weighted import FLOAT, scaled
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class AvgPool(Operator):
    """y = clamp(requantise(sum over the window), low, high); the requantisation also divides by the count."""

    name = "avgpool"
    lowers: ClassVar[tuple[str, ...]] = ("avgpool",)
    attrs: ClassVar[frozenset[str]] = frozenset(
        {"kernel", "stride", "padding", "ceil", "count_include_pad", "rounding"}
    )

    def lower(self, node: Node, b: Builder) -> None:
        """Append an avgpool call."""
        x, shape = b.source(node), hwc(node.shape)
        kernel, stride = pair(node.attrs["kernel"]), pair(node.attrs["stride"])
        pad = covering(x.shape, shape, kernel, stride, borders(node.attrs["padding"]))
        low, high = b.limits(node)
        attrs = {"kernel": kernel, "stride": stride, "pad": pad, "low": low, "high": high}
        found: dict[str, Array] = {}
        fmt, count = None, kernel[0] * kernel[1]
        if b.integers:
            fmt = b.format(node)
            rounding = node.attrs.get("rounding", "half_up")
            division = integer.pool_requant(b.scale_of(x), fmt.scale[0], count, rounding)
            ones = np.ones((1, count), np.int64)
            clause = integer.overflow(ones, np.zeros(1, np.int64), int(x.low), int(x.high), division)
            if clause:
                b.refuse(node, f"{clause} (int32); pool in two steps")
            attrs |= scaled(division, found, b, 1)
        else:
            attrs |= FLOAT
        b.finish(node, b.call("avgpool", node, [x], shape, attrs, found, format=fmt))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Add tap after tap, in (ky, kx) order; float32 then divides by the count."""
        a, x = call.attrs, inputs[0]
        view = windows(x, a["kernel"], a["stride"], a["pad"], (out.shape[0], out.shape[1]))
        acc = np.zeros((len(x), *out.shape), np.float32 if out.dtype == "float32" else np.int64)
        for ky in range(a["kernel"][0]):
            for kx in range(a["kernel"][1]):
                acc += view[:, :, :, ky, kx]
        if out.dtype == "float32":
            acc /= np.float32(a["kernel"][0] * a["kernel"][1])
        return requantised(acc, call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_avgpool_*."""
        x, y = program.buffers[call.inputs[0]], program.buffers[call.output]
        constants = {"pool": pool_struct(call, program)}
        if y.dtype == "float32":
            count = c_float(call.attrs["kernel"][0] * call.attrs["kernel"][1])
            text = f"thrifty_avgpool_f32(&$pool, $x, $y, {count}, {limits(call, y.dtype)});"
            return CCall(text, ("pool.h",), constants)
        how, shift = scaling(call), int(call.attrs["shift"][0])
        fields = {"multiplier": 0, "pre_shift": how.pre_shift, "half": int(how.half[0]), "shift": shift}
        if how.multiplier is not None:
            fields["multiplier"] = int(how.multiplier[0])
        fields |= {"low": int(call.attrs["low"]), "high": int(call.attrs["high"])}
        constants["mean"] = CStruct("thrifty_pool_mean_t", fields)
        return CCall(f"thrifty_avgpool_{suffix(x, y)}(&$pool, &$mean, $x, $y);", ("pool.h",), constants)

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a mean of random windows, often with an activation."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))))
        return e.graph(e.activation(e.pool(x, "avgpool")))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input, without padding above or to the left: no output then lies before its window."""
        return (0,) if call.attrs["pad"][0] == call.attrs["pad"][2] == 0 else ()
