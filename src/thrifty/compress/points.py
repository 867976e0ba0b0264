"""Where a network is quantised, and how each of its activations is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from thrifty.arith import Format
from thrifty.compress.fake_quantize import fake_quantize
from thrifty.graph import Graph, Node
from thrifty.integer import SOFTMAX_FORMAT

WEIGHTED = ("conv", "linear")
CONSTANTS = {"conv": ("weight", "bias"), "linear": ("weight", "bias"), "batchnorm": ("scale", "shift")}
_NOT_NEGATIVE = ("relu", "relu6", "softmax")
_PASSES_SIGN = ("maxpool", "avgpool", "flatten", "permute", "pad", "identity", "add", "concat")


@dataclass(frozen=True)
class Arithmetic:
    """The choices of Quantize that stay with the model: how it stores and scales."""

    bits: int = 8  # of activations
    scales: str = "multiplier"  # "multiplier" | "power_of_two"
    per_channel: bool = True  # weights have a scale per output channel
    rounding: str = "half_up"
    unsigned: bool = True  # 8 bits or fewer: tensors that cannot be negative use the whole range
    fixed_scale: float | None = None  # one scale for every tensor of the network


class ActivationQuantizer(nn.Module):
    """Rounds an activation to the stored integers times a scale, a buffer (1,) that calibration sets."""

    scale: Tensor

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.register_buffer("scale", torch.ones(1))

    @property
    def format(self) -> Format:
        """The format of the stored activation."""
        return Format(self.bits, self.signed, (float(self.scale),))

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded."""
        return fake_quantize(x, self.scale, self.bits, self.signed)

    def extra_repr(self) -> str:
        """Show the width and the scale."""
        return f"bits={self.bits}, signed={self.signed}, scale={float(self.scale):g}"


def new_quantizer(graph: Graph, name: str, arithmetic: Arithmetic) -> ActivationQuantizer:
    """Return the quantiser of a node's output, its scale not yet set; softmax has one format, always."""
    if graph[name].op == "softmax":
        fixed = ActivationQuantizer(SOFTMAX_FORMAT.bits, SOFTMAX_FORMAT.signed)
        fixed.scale.fill_(SOFTMAX_FORMAT.scale[0])
        return fixed
    unsigned = arithmetic.unsigned and arithmetic.bits <= 8 and never_negative(graph, name)
    return ActivationQuantizer(arithmetic.bits, not unsigned)


def never_negative(graph: Graph, name: str) -> bool:
    """Whether the values of a node are never below zero, whatever the input."""
    node = graph[name]
    if node.op in _NOT_NEGATIVE:
        return True
    return node.op in _PASSES_SIGN and all(never_negative(graph, i) for i in node.inputs)


def weights_of(graph: Graph) -> dict[str, list[Node]]:
    """Return the nodes that use each weight, by tensor name: several where a module is called again.

    A weight that is no parameter has no name; `refusals` names its layer.
    """
    found: dict[str, list[Node]] = {}
    for node in graph:
        if node.op in WEIGHTED and "weight" in node.params:
            found.setdefault(node.params["weight"], []).append(node)
    return found


def without_constants(graph: Graph) -> Graph:
    """Return the graph as structure only."""
    nodes = {n.name: replace(n, constants={}, format=None, weight_format=None) for n in graph}
    return graph.with_nodes(nodes)


def last_uses(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Return for each node the values that nothing reads after it ran."""
    last = {n.name: n.name for n in graph}
    for node in graph:
        last.update(dict.fromkeys(node.inputs, node.name))
    found: dict[str, tuple[str, ...]] = {n.name: () for n in graph}
    for name, at in last.items():
        if name not in graph.outputs:
            found[at] += (name,)
    return found
