"""Attributes of windowed operators: one or two spatial axes become two."""

from __future__ import annotations

from collections.abc import Sequence

from thrifty.deploy.c.ccall import CStruct
from thrifty.deploy.ops.builder import Shape
from thrifty.deploy.program import Call, Program


def pair(values: Sequence[int], neutral: int = 1) -> tuple[int, int]:
    """Return (y, x) of an attribute with one entry per spatial axis.

    >>> pair((3,)), pair((3, 2))
    ((1, 3), (3, 2))
    """
    found = (neutral, *values)[-2:]
    return int(found[0]), int(found[1])


def borders(padding: Sequence[tuple[int, int]]) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of ((before, after) per spatial axis).

    >>> borders(((1, 2),))
    (0, 0, 1, 2)
    """
    (top, bottom), (left, right) = ((0, 0), *padding)[-2:]
    return int(top), int(bottom), int(left), int(right)


def covering(
    shape: Shape, out: Shape, kernel: tuple[int, int], stride: tuple[int, int], pad: Sequence[int]
) -> tuple[int, ...]:
    """Return `pad` with bottom and right just as far as the last window reaches (0 when it ends before)."""
    top, _, left, _ = pad
    bottom = max(0, (out[0] - 1) * stride[0] + kernel[0] - shape[0] - top)
    right = max(0, (out[1] - 1) * stride[1] + kernel[1] - shape[1] - left)
    return top, bottom, left, right


def pool_struct(call: Call, program: Program) -> CStruct:
    """Return the geometry of a pool for C."""
    x, y, a = program.buffers[call.inputs[0]], program.buffers[call.output], call.attrs
    names = ("in_height", "in_width", "channels", "out_height", "out_width", "kernel_height", "kernel_width",
             "stride_height", "stride_width", "top", "left")  # fmt: skip
    values = (*x.shape, *y.shape[:2], *a["kernel"], *a["stride"], a["pad"][0], a["pad"][2])
    return CStruct("thrifty_pool_t", dict(zip(names, map(int, values))))
