"""Run the nodes of a Graph in torch: in float (for training), and in the integers of the deployed program.

Float tensors are in PyTorch's layout. Integers travel as float32 tensors with whole values below 2^24,
exact, because convolutions and pools want floats; accumulators are int64. The meaning of every operator is
in deploy/program.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from thrifty import arith, integer
from thrifty.compress.fake_quantize import along
from thrifty.graph import Array, Graph, Node

Constants = Mapping[str, Tensor]
EXACT_FLOAT32 = 2**24  # integers below this are exact in float32, sums included

# --- float ---


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, node: Node) -> Tensor:
    """Convolve; padding may differ before and after."""
    x, padding = _pad_unequal(x, node.attrs["padding"])
    run = F.conv1d if len(node.attrs["stride"]) == 1 else F.conv2d
    a = node.attrs
    return run(x, weight, bias, a["stride"], padding, a["dilation"], a["groups"])


def max_pool(x: Tensor, node: Node) -> Tensor:
    """Take the largest of each window; windows are cut at the border."""
    run = F.max_pool1d if len(node.attrs["kernel"]) == 1 else F.max_pool2d
    a = node.attrs
    x, padding = _pad_unequal(x, a["padding"], -float("inf"))
    out: Tensor = run(x, a["kernel"], a["stride"], padding, 1, a["ceil"])
    return out


def avg_pool(x: Tensor, node: Node) -> Tensor:
    """Take the mean of each window."""
    run = F.avg_pool1d if len(node.attrs["kernel"]) == 1 else F.avg_pool2d
    a = node.attrs
    x, padding = _pad_unequal(x, a["padding"])
    return run(x, a["kernel"], a["stride"], padding, a["ceil"], a["count_include_pad"])


def zero_pad(x: Tensor, node: Node) -> Tensor:
    """Add zeros around the map."""
    return F.pad(x, _flat_padding(node.attrs["padding"]))


def _pad_unequal(x: Tensor, padding: Sequence[tuple[int, int]], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Return the input, padded here if before and after differ, and the padding left to the operator."""
    if all(before == after for before, after in padding):
        return x, [before for before, _ in padding]
    return F.pad(x, _flat_padding(padding), value=value), [0] * len(padding)


def _flat_padding(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [n for pair in reversed(padding) for n in pair]


def _affine(x: Tensor, c: Constants) -> Tensor:
    return x * along(c["scale"], x.dim(), 1) + along(c["shift"], x.dim(), 1)


def _argmax(x: Tensor, node: Node) -> Tensor:
    return x.argmax(node.attrs["axis"] + 1, keepdim=node.attrs.get("keepdim", False))


def _permute(x: Tensor, node: Node) -> Tensor:
    return x.permute(0, *(a + 1 for a in node.attrs["axes"]))


FLOAT: dict[str, Callable[[Node, list[Tensor], Constants], Tensor]] = {
    "conv": lambda n, x, c: conv(x[0], c["weight"], c.get("bias"), n),
    "linear": lambda n, x, c: F.linear(x[0], c["weight"], c.get("bias")),
    "batchnorm": lambda n, x, c: _affine(x[0], c),
    "add": lambda n, x, c: x[0] + x[1],
    "concat": lambda n, x, c: torch.cat(x, n.attrs["axis"] + 1),
    "relu": lambda n, x, c: F.relu(x[0]),
    "relu6": lambda n, x, c: F.relu6(x[0]),
    "hardswish": lambda n, x, c: F.hardswish(x[0]),
    "softmax": lambda n, x, c: F.softmax(x[0], n.attrs["axis"] + 1),
    "argmax": lambda n, x, c: _argmax(x[0], n),
    "identity": lambda n, x, c: x[0],
    "maxpool": lambda n, x, c: max_pool(x[0], n),
    "avgpool": lambda n, x, c: avg_pool(x[0], n),
    "flatten": lambda n, x, c: x[0].flatten(1),
    "permute": lambda n, x, c: _permute(x[0], n),
    "pad": lambda n, x, c: zero_pad(x[0], n),
}


# --- integers ---


@dataclass(frozen=True)
class Exact:
    """The integer constants of one node, as tensors ready to use."""

    low: int = 0  # the result is clamped to [low, high]
    high: int = 0
    weight: Tensor | None = None  # float32 where that is exact, else float64
    bias: Tensor | None = None  # int64
    multiplier: Tensor | None = None  # int64, (C, 1, ..) or (1,); None: a shift
    pre_shift: int = 0
    shift: Tensor | None = None  # int64, likewise
    floor: bool = False
    multipliers: tuple[int, ...] = ()  # of add and concat, with sum_shift
    sum_shift: int = 0
    table: Tensor | None = None  # float32 of lookup, int64 of softmax
    first: int = 0  # the integer of the first entry of a lookup


def exact_constants(graph: Graph, node: Node, device: torch.device) -> Exact:
    """Return the integer constants of a node of a graph that carries formats and float constants.

    Raises KnobError when a bias or a scale ratio does not fit.
    """
    if node.op in ("input", "argmax"):
        return Exact()
    low, high = integer.output_limits(graph, node.name)
    limits = {"low": low, "high": high}
    made = _MAKERS[node.op](graph, node, device) if node.op in _MAKERS else {}
    return Exact(**(limits | made))


def _weights(graph: Graph, node: Node, device: torch.device) -> dict[str, Any]:
    fmt = node.weight_format
    assert fmt is not None
    bias = node.constants.get("bias", np.zeros(len(node.constants["weight"]), np.float32))
    return _products(graph, node, (node.constants["weight"], bias, fmt), device)


def _batchnorm(graph: Graph, node: Node, device: torch.device) -> dict[str, Any]:
    source, out = (integer.output_format(graph, n) for n in (node.inputs[0], node.name))
    assert source is not None
    assert out is not None
    scale, shift = node.constants["scale"], node.constants["shift"]
    limits = integer.output_limits(graph, node.inputs[0])
    fmt = integer.batchnorm_format(scale, shift, source, limits, out)
    return _products(graph, node, (scale.reshape(-1, *[1] * len(node.shape)), shift, fmt), device)


def _products(
    graph: Graph, node: Node, layer: tuple[Array, Array, arith.Format], device: torch.device
) -> dict[str, Any]:
    weight, bias, fmt = layer
    source, out = (integer.output_format(graph, n) for n in (node.inputs[0], node.name))
    assert source is not None
    assert out is not None
    weight_q = integer.weight_integers(weight, fmt)
    bias_q = integer.bias_integers(bias, source.scale[0], fmt.scale)
    least, greatest = integer.acc_bound(weight_q, np.zeros_like(bias_q), *integer.output_limits(graph, node.inputs[0]))
    small = max(-int(least.min()), int(greatest.max())) < EXACT_FLOAT32
    narrow = source.bits <= 8 and fmt.bits <= 8 and device.type == "cpu"  # exact even where torch rounds to bfloat16
    scaling = integer.requant(source.scale[0], fmt.scale, out.scale[0], node.attrs.get("rounding", "half_up"))
    return {
        "weight": torch.from_numpy(weight_q).to(device, torch.float32 if small and narrow else torch.float64),
        "bias": _channels(bias_q, node, device),
        **_scaling(scaling, node, device),
    }


def _scaling(scaling: integer.Requant, node: Node, device: torch.device) -> dict[str, Any]:
    if scaling.multiplier is not None:
        return {"multiplier": _channels(scaling.multiplier, node, device), "pre_shift": scaling.pre_shift}
    shift = _channels(np.asarray(scaling.shift, np.int64), node, device)
    return {"shift": shift, "floor": scaling.rounding == "floor"}


def _channels(values: Array, node: Node, device: torch.device) -> Tensor:
    """Return int64 (C, 1, ..), which broadcasts over the channels of the node's output."""
    return torch.from_numpy(values.astype(np.int64)).reshape(-1, *[1] * (len(node.shape) - 1)).to(device)


def _mean(graph: Graph, node: Node, device: torch.device) -> dict[str, Any]:
    source, out = (integer.output_format(graph, n) for n in (node.inputs[0], node.name))
    assert source is not None
    assert out is not None
    count = int(np.prod(node.attrs["kernel"]))
    rounding = node.attrs.get("rounding", "half_up")
    return _scaling(integer.pool_requant(source.scale[0], out.scale[0], count, rounding), node, device)


def _sum(graph: Graph, node: Node, device: torch.device) -> dict[str, Any]:
    formats = [integer.output_format(graph, n) for n in node.inputs]
    out = integer.output_format(graph, node.name)
    assert out is not None
    known = [f for f in formats if f is not None]
    scales = [f.scale[0] for f in known]
    multipliers, shift = integer.add_constants(scales, out.scale[0], max(f.bits for f in known))
    return {"multipliers": multipliers, "sum_shift": shift}


def _lookup(graph: Graph, node: Node, device: torch.device) -> dict[str, Any]:
    source, out = (integer.output_format(graph, n) for n in (node.inputs[0], node.name))
    assert source is not None
    assert out is not None
    table = integer.lookup_table(integer.hardswish, source, out)
    return {
        "table": torch.from_numpy(table.astype(np.float32)).to(device),
        "first": -128 if source.signed else 0,
    }


def _exponentials(graph: Graph, node: Node, device: torch.device) -> dict[str, Any]:
    source = integer.output_format(graph, node.inputs[0])
    assert source is not None
    return {"table": torch.from_numpy(integer.softmax_table(source.scale[0]).astype(np.int64)).to(device)}


_MAKERS: dict[str, Callable[[Graph, Node, torch.device], dict[str, Any]]] = {
    "conv": _weights,
    "linear": _weights,
    "batchnorm": _batchnorm,
    "avgpool": _mean,
    "add": _sum,
    "concat": _sum,
    "hardswish": _lookup,
    "softmax": _exponentials,
}


def run_exact(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    """Return the integers that a node gives for its integer inputs, both as float32."""
    run = _EXACT.get(node.op)
    if run is not None:
        return run(node, x, c)
    return FLOAT[node.op](node, x, {})  # only moves or compares: maxpool, flatten, permute, pad, identity, argmax


def _finish(acc: Tensor, c: Exact) -> Tensor:
    """Requantise int64 accumulators and clamp."""
    if c.multiplier is not None:
        acc = arith.scale_by(acc, c.multiplier, c.pre_shift)
    elif c.shift is not None:
        left, right = (-c.shift).clip(0), c.shift.clip(0)
        half = torch.zeros_like(right) if c.floor else (torch.ones_like(right) << right) >> 1
        acc = ((acc << left) + half) >> right
    return arith.saturate(acc, c.low, c.high).to(torch.float32)


def _exact_conv(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    assert c.weight is not None
    assert c.bias is not None
    return _finish(conv(x[0].to(c.weight.dtype), c.weight, None, node).to(torch.int64) + c.bias, c)


def _exact_linear(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    assert c.weight is not None
    assert c.bias is not None
    return _finish(F.linear(x[0].to(c.weight.dtype), c.weight).to(torch.int64) + c.bias, c)


def _exact_batchnorm(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    assert c.weight is not None
    assert c.bias is not None
    return _finish(x[0].to(torch.int64) * c.weight.to(torch.int64).reshape(c.bias.shape) + c.bias, c)


def _exact_add(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    acc = x[0].to(torch.int64) * c.multipliers[0] + x[1].to(torch.int64) * c.multipliers[1]
    return arith.saturate(arith.round_shift(acc, c.sum_shift), c.low, c.high).to(torch.float32)


def _exact_concat(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    acc = torch.cat([part.to(torch.int64) * m for part, m in zip(x, c.multipliers)], node.attrs["axis"] + 1)
    return arith.saturate(arith.round_shift(acc, c.sum_shift), c.low, c.high).to(torch.float32)


def _exact_clamp(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    return x[0].clamp(c.low, c.high)


def _exact_avgpool(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    a = node.attrs
    padded, padding = _pad_unequal(x[0].to(torch.float64), a["padding"])
    if len(a["kernel"]) == 1:
        padded = padded.unsqueeze(2)
    kernel, stride = ((1,) * (2 - len(v)) + tuple(v) for v in (a["kernel"], a["stride"]))
    around = [0] * (2 - len(padding)) + list(padding)
    total = F.avg_pool2d(padded, kernel, stride, around, a["ceil"], True, 1)  # divisor 1: the sum
    return _finish(total.reshape(-1, *node.shape).to(torch.int64), c)


def _exact_lookup(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    assert c.table is not None
    return c.table[x[0].to(torch.int64) - c.first]


def _exact_softmax(node: Node, x: list[Tensor], c: Exact) -> Tensor:
    assert c.table is not None
    axis = node.attrs["axis"] + 1
    q = x[0].to(torch.int64)
    e = c.table[q.amax(axis, keepdim=True) - q]
    total = e.sum(axis, keepdim=True)
    return ((e * 256 + (total >> 1)) // total).clip(0, 255).to(torch.float32)


_EXACT: dict[str, Callable[[Node, list[Tensor], Exact], Tensor]] = {
    "conv": _exact_conv,
    "linear": _exact_linear,
    "batchnorm": _exact_batchnorm,
    "add": _exact_add,
    "concat": _exact_concat,
    "relu": _exact_clamp,
    "relu6": _exact_clamp,
    "hardswish": _exact_lookup,
    "softmax": _exact_softmax,
    "avgpool": _exact_avgpool,
}
