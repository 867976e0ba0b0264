"""What conv, depthwise and linear share in lowering: integer weights and biases, proven not to overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from thrifty import integer
from thrifty.arith import Format
from thrifty.deploy.c.ccall import CCall, CText
from thrifty.deploy.c.pack import pack
from thrifty.deploy.ops.builder import Builder, Value
from thrifty.deploy.program import Array, Call, Program
from thrifty.errors import KnobError
from thrifty.graph import Node

FLOAT = {"requant": "float", "pre_shift": 0, "shift": (0,), "rounding": "half_up"}


def refuse_weights(node: Node) -> Iterator[str]:
    """Yield what is wrong with the formats of the weights of a node."""
    fmt = node.weight_format
    if fmt is None:
        return
    if not fmt.signed:
        yield "its weights are unsigned; only signed weights are supported"
    if len(fmt.scale) not in (1, len(node.constants["weight"])):
        yield f"its weights have {len(fmt.scale)} scales; 1 or one per output channel is supported"


def constants(
    node: Node, b: Builder, x: Value, weight: Array, bias: Array | None, weight_format: Format | None
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the attributes (with low and high) and the constants of a weighted sum.

    weight: (Co, ...) reals, already in the order of the program; bias: (Co,) or None.
    Refuses, through the builder, sums that may leave int32.
    """
    low, high = b.limits(node)
    limits = {"low": low, "high": high}
    real_bias = np.zeros(len(weight)) if bias is None else bias
    if not b.integers:
        never_minus_zero = real_bias + np.float32(0)
        found = {"weight": b.shared(weight, "float32"), "bias": b.shared(never_minus_zero, "float32")}
        return {"weight_bits": 32, **FLOAT, **limits}, found
    if weight_format is None:
        raise KnobError("its weights have no format, although the network is quantised")
    scale = b.scale_of(x)
    rounding = node.attrs.get("rounding", "half_up")
    scaling = integer.requant(scale, weight_format.scale, b.format(node).scale[0], rounding)
    w = integer.weight_integers(weight, weight_format)
    bias_q = integer.bias_integers(real_bias, scale, weight_format.scale)
    clause = integer.overflow(w, bias_q, int(x.low), int(x.high), scaling)
    if clause:
        b.refuse(node, f"{clause} (int32); quantise its weights to fewer bits, or with a coarser scale")
    found = {"weight": b.shared(w, integer.storage(weight_format)), "bias": b.shared(bias_q, "int32")}
    return {"weight_bits": weight_format.bits, **scaled(scaling, found, b, len(w)), **limits}, found


def scaled(scaling: integer.Requant, found: dict[str, Array], b: Builder, channels: int) -> dict[str, Any]:
    """Return the attributes of a requantisation; its multiplier is added to the constants `found`."""
    if scaling.multiplier is not None:
        found["multiplier"] = b.shared(np.broadcast_to(scaling.multiplier, (channels,)), "int32")
    return {
        "requant": scaling.kind,
        "pre_shift": scaling.pre_shift,
        "shift": scaling.shift,
        "rounding": scaling.rounding,
    }


def kernel(call: Call, program: Program) -> CCall:
    """Return the call of the C kernel that suits this layer best, with its packed constants."""
    found = pack(call, program.buffers[call.inputs[0]], program.buffers[call.output])
    text = found.call("$k", "$x", "$y", "$scratch")
    constants = {"k": CText(found.constants, found.flash_bytes)}
    note = f"kernel {found.variant}"
    return CCall(text, found.headers, constants, found.scratch_bytes, note, found.instances)
