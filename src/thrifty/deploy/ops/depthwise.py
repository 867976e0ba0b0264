"""Convolution with one filter per channel, and the batch norm that stands alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops import weighted
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import requantised, windows
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Depthwise(Operator):
    """acc = bias + sum over the window of x * weight, channel by channel; a batch norm is a window of one."""

    name = "depthwise"
    lowers: ClassVar[tuple[str, ...]] = ("batchnorm",)
    attrs: ClassVar[frozenset[str]] = frozenset({"rounding"})

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Refuse batch norms whose constants do not match their channels."""
        channels = node.shape[0] if node.shape else 0
        for key in ("scale", "shift"):
            if node.constants[key].shape != (channels,):
                found = node.constants[key].shape
                yield f"its {key} has shape {found} for {channels} channels; one per channel is supported"

    def lower(self, node: Node, b: Builder) -> None:
        """Append a 1x1 depthwise call."""
        x, shape = b.source(node), hwc(node.shape)
        scale, shift, fmt = node.constants["scale"], node.constants["shift"], None
        weight_format = node.weight_format
        if b.integers:
            fmt = b.format(node)
            if weight_format is None and x.format is not None:
                limits = (int(x.low), int(x.high))
                weight_format = integer.batchnorm_format(scale, shift, x.format, limits, fmt)
        weight = scale.reshape(-1, 1, 1, 1)
        attrs, constants = weighted.constants(node, b, x, weight, shift, weight_format)
        constants["weight"] = b.shared(constants["weight"].reshape(1, 1, -1), str(constants["weight"].dtype))
        attrs |= {"stride": (1, 1), "pad": (0, 0, 0, 0)}
        macs = shape[0] * shape[1] * shape[2]
        b.finish(node, b.call("depthwise", node, [x], shape, attrs, constants, format=fmt, macs=macs))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Add one tap after the other, over all channels at once."""
        w = call.constants["weight"]
        kh, kw, _ = w.shape
        size = (out.shape[0], out.shape[1])
        view = windows(inputs[0], (kh, kw), call.attrs["stride"], call.attrs["pad"], size)
        wide = np.float32 if out.dtype == "float32" else np.int64
        acc: Array = np.broadcast_to(call.constants["bias"], (len(view), *out.shape)).astype(wide)
        for ky in range(kh):
            for kx in range(kw):
                acc += view[:, :, :, ky, kx].astype(wide) * w[ky, kx].astype(wide)
        return requantised(acc, call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call the kernel that pack chooses."""
        return weighted.kernel(call, program)

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a depthwise convolution, or a batch norm, of random shape."""
        e = Example(rng, kind)
        shape = e.map_shape(channels=int(rng.integers(2, 12)))
        x = e.input(shape)
        y = e.batchnorm(x) if rng.random() < 0.3 else e.conv(x, shape[0], groups=shape[0])
        return e.graph(e.activation(y))
