"""A network in torch, in float64, rounded only where a format says so: an independent meaning."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from thrifty import integer
from thrifty.graph import Graph, Node


def outputs(graph: Graph, stored: np.ndarray) -> np.ndarray:
    """Return integers (reals without formats) for inputs in buffer layout (n, H, W, C)."""
    values: dict[str, torch.Tensor] = {}
    points = set(graph.quantised_points())
    for node in graph:
        if node.op == "input":
            fmt = node.format
            x = torch.from_numpy(np.asarray(stored)).to(torch.float64)
            x = x.clamp(fmt.low, fmt.high) * fmt.scale[0] if fmt else x
            values[node.name] = from_buffer(x, node.shape)
            continue
        value = OPERATORS[node.op](node, *(values[name] for name in node.inputs))
        if node.format and (node.name in points or node.op == "identity"):
            value = rounded(node, value, graph)
        values[node.name] = value
    last = graph[graph.outputs[0]]
    fmt = integer.output_format(graph, last.name) if graph[graph.inputs[0]].format else None
    result = to_buffer(values[last.name], last.shape)
    return result.numpy() if fmt is None else torch.round(result / fmt.scale[0]).to(torch.int64).numpy()


def rounded(node: Node, value: torch.Tensor, graph: Graph) -> torch.Tensor:
    fmt = node.format
    producer = graph[node.inputs[0]] if node.op in ("relu", "relu6") else node
    half = 0.0 if producer.attrs.get("rounding") == "floor" else 0.5
    return torch.floor(value / fmt.scale[0] + half).clamp(fmt.low, fmt.high) * fmt.scale[0]


def allowed_units(graph: Graph) -> float:
    """The stated error: one unit, and what rounded ratios of sums and factors of batch norms add."""
    if any(n.op == "batchnorm" for n in graph):
        return 40 if any(n.format and n.format.bits > 8 for n in graph) else 4
    return 1 + max((_ratio_error(graph, n) for n in graph), default=0.0)


def _ratio_error(graph: Graph, node: Node) -> float:
    fmt = node.format
    if node.op in {"add", "concat"} or (node.op == "identity" and fmt):
        point = graph.fused_into(node.name) or node.name
        fmt = graph[point].format
        inputs = [integer.output_format(graph, name) for name in node.inputs]
        bits = max(f.bits for f in inputs)
        _, shift = integer.add_constants([f.scale[0] for f in inputs], fmt.scale[0], 8 if bits <= 8 else 16)
        reach = [max(-f.low, f.high) * 0.5 * 2.0**-shift for f in inputs]
        return sum(reach) if node.op == "add" else max(reach)
    return 0.0


def from_buffer(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(n, H, W, C) to PyTorch's layout."""
    return x.permute(0, 3, 1, 2).reshape(len(x), *shape)


def to_buffer(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """PyTorch's layout to (n, H, W, C)."""
    c, h, w = {1: (shape[0], 1, 1), 2: (shape[0], 1, shape[-1]), 3: shape}[len(shape)] if shape else (1, 1, 1)
    return x.reshape(len(x), c, h, w).permute(0, 2, 3, 1).contiguous()


def weights(node: Node) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias, fmt = node.constants["weight"], node.constants.get("bias"), node.weight_format
    real = torch.from_numpy(np.asarray(weight, dtype=np.float64))
    if fmt:
        scale = torch.tensor(fmt.scale, dtype=torch.float64).reshape(-1, *[1] * (real.ndim - 1))
        real = torch.floor(real / scale + 0.5).clamp(fmt.low, fmt.high) * scale
    return real, None if bias is None else torch.from_numpy(np.asarray(bias, dtype=np.float64))


def conv(node: Node, x: torch.Tensor) -> torch.Tensor:
    weight, bias = weights(node)
    pads = [p for pair in reversed(node.attrs["padding"]) for p in pair]
    f = F.conv2d if weight.ndim == 4 else F.conv1d
    stride, groups = tuple(node.attrs["stride"]), node.attrs["groups"]
    return f(F.pad(x, pads), weight, bias, stride, 0, tuple(node.attrs["dilation"]), groups)


def linear(node: Node, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, *weights(node))


def batchnorm(node: Node, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale, shift = (
        torch.from_numpy(np.asarray(node.constants[k], np.float64)).reshape(shape) for k in ("scale", "shift")
    )
    return x * scale + shift


def pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    flat = x.ndim == 3
    kernel, stride, padding = (tuple(node.attrs[k]) for k in ("kernel", "stride", "padding"))
    if flat:
        x, kernel, stride, padding = x[:, :, None], (1, *kernel), (1, *stride), ((0, 0), *padding)
    sides = [p for pair in reversed(padding) for p in pair]
    high = (x.shape[2] + sum(padding[0]), x.shape[3] + sum(padding[1]))
    extra = [max(0, (n - 1) * s + k - h) for n, s, k, h in zip(_spatial(node), stride, kernel, high)]
    sides = [sides[0], sides[1] + extra[1], sides[2], sides[3] + extra[0]]
    if node.op == "maxpool":
        result = F.max_pool2d(F.pad(x, sides, value=-torch.inf), kernel, stride)
    else:
        sums = F.avg_pool2d(F.pad(x, sides), kernel, stride, divisor_override=1)
        inside = torch.ones_like(x)
        if node.attrs.get("count_include_pad", True):
            inside = F.pad(inside, [p for pair in reversed(padding) for p in pair], value=1.0)
            sides = [0, extra[1], 0, extra[0]]
        counts = F.avg_pool2d(F.pad(inside, sides), kernel, stride, divisor_override=1)
        result = sums / counts
    return result[:, :, 0] if flat else result


def _spatial(node: Node) -> tuple[int, int]:
    return node.shape[1:] if len(node.shape) == 3 else (1, node.shape[1])


def softmax(node: Node, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=1 + node.attrs.get("axis", 0) % len(node.shape))


def argmax(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).argmax(dim=1, keepdim=True)


OPERATORS = {
    "conv": conv,
    "linear": linear,
    "batchnorm": batchnorm,
    "maxpool": pool,
    "avgpool": pool,
    "add": lambda node, a, b: a + b,
    "concat": lambda node, *xs: torch.cat(xs, dim=1 + node.attrs["axis"]),
    "relu": lambda node, x: x.relu(),
    "relu6": lambda node, x: x.clamp(0, 6),
    "hardswish": lambda node, x: x * (x + 3).clamp(0, 6) / 6,
    "softmax": softmax,
    "argmax": argmax,
    "flatten": lambda node, x: x.flatten(1),
    "identity": lambda node, x: x,
    "permute": lambda node, x: x.permute(0, *(1 + a for a in node.attrs["axes"])),
    "pad": lambda node, x: F.pad(x, [p for pair in reversed(node.attrs["padding"]) for p in pair]),
}
