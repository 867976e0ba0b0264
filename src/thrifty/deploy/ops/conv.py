"""Convolution, also grouped, over one or two spatial axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops import weighted
from thrifty.deploy.ops.builder import Builder, hwc
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.numeric import integer_product, requantised, windows
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.ops.spatial import borders, pair
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node


class Conv(Operator):
    """acc = bias + sum of x * weight over the window; one filter per channel becomes `depthwise`."""

    name = "conv"
    lowers: ClassVar[tuple[str, ...]] = ("conv",)
    attrs: ClassVar[frozenset[str]] = frozenset({"stride", "padding", "dilation", "groups", "rounding"})

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Refuse odd weight formats."""
        yield from weighted.refuse_weights(node)

    def lower(self, node: Node, b: Builder) -> None:
        """Append a conv call, or a depthwise one."""
        x, groups, shape = b.source(node), int(node.attrs["groups"]), hwc(node.shape)
        weight = channels_last(node.constants["weight"])
        attrs, constants = weighted.constants(node, b, x, weight, node.constants.get("bias"), node.weight_format)
        attrs |= {"stride": pair(node.attrs["stride"]), "pad": borders(node.attrs["padding"])}
        macs = shape[0] * shape[1] * int(np.prod(weight.shape))
        op = "conv"
        if groups > 1 and groups == x.shape[2] == shape[2]:
            op = "depthwise"
            per_tap = constants["weight"][..., 0].transpose(1, 2, 0)
            constants["weight"] = b.shared(per_tap, str(per_tap.dtype))
        else:
            attrs["groups"] = groups
        fmt = b.format(node) if b.integers else None
        b.finish(node, b.call(op, node, [x], shape, attrs, constants, format=fmt, macs=macs))

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Multiply the windows, laid out as rows, by the filters."""
        w, groups = call.constants["weight"], call.attrs["groups"]
        filters, kh, kw, width = w.shape
        size = (out.shape[0], out.shape[1])
        view = windows(inputs[0], (kh, kw), call.attrs["stride"], call.attrs["pad"], size)
        if out.dtype == "float32":
            return requantised(_float_sums(view, w, call.constants["bias"], groups), call, out)
        rows = view.reshape(*view.shape[:5], groups, width).transpose(0, 5, 1, 2, 3, 4, 6)
        rows = rows.reshape(len(view), groups, size[0] * size[1], kh * kw * width)
        columns = w.reshape(groups, filters // groups, kh * kw * width).transpose(0, 2, 1)
        acc = integer_product(rows, columns).transpose(0, 2, 1, 3).reshape(len(view), *size, filters)
        return requantised(acc + call.constants["bias"].astype(np.int64), call, out)

    def c(self, call: Call, program: Program) -> CCall:
        """Call the kernel that pack chooses."""
        return weighted.kernel(call, program)

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return an input and a convolution of random shape, often with an activation."""
        e = Example(rng, kind)
        groups = int(rng.choice([1, 1, 1, 2, 4]))
        shape = e.map_shape(channels=groups * int(rng.integers(1, 6)))
        x = e.input(shape)
        return e.graph(e.activation(e.conv(x, groups * int(rng.integers(1, 7)), groups=groups)))


def channels_last(weight: Array) -> Array:
    """Return (Co, kh, kw, Ci) of PyTorch's (Co, Ci, kh, kw) or (Co, Ci, k)."""
    weight = weight if weight.ndim == 4 else weight[:, :, None, :]
    return weight.transpose(0, 2, 3, 1)


def _float_sums(view: Array, weight: Array, bias: Array, groups: int) -> Array:
    """Return float32 sums from the bias on, in (ky, kx, ci) order, each product and each sum rounded."""
    n, oy, ox, kh, kw, _ = view.shape
    filters, width = weight.shape[0], weight.shape[3]
    x = view.reshape(n, oy, ox, kh, kw, groups, width)
    w = weight.reshape(groups, filters // groups, kh, kw, width)
    acc = np.broadcast_to(bias, (n, oy, ox, filters)).astype(np.float32)
    acc = acc.reshape(n, oy, ox, groups, filters // groups)
    for ky in range(kh):
        for kx in range(kw):
            for ci in range(width):
                acc += x[:, :, :, ky, kx, :, ci, None] * w[:, :, ky, kx, ci]
    return acc.reshape(n, oy, ox, filters)
