"""A network as plain data: what `capture` makes of a module, and what cost, ties and lowering read.

Shapes leave out the batch axis and are channels-first, as in PyTorch: (C, H, W), (C, L) or (C,).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.arith import Format

Array = npt.NDArray[Any]

# Canonical operators. Anything else keeps its aten name ("aten.erf.default") and is refused where it matters.
#   input                                    the example
#   conv      weight, bias?; stride, padding ((before, after) per spatial axis), dilation, groups
#   linear    weight, bias?
#   batchnorm scale, shift (already gamma/sigma and beta - mean*scale)
#   add       two inputs of equal shape
#   concat    axis (0 = channels)
#   relu, relu6, hardswish, softmax (axis), argmax, identity
#   maxpool, avgpool   kernel, stride, padding, ceil (bool), count_include_pad (avgpool)
#   flatten            to (features,)
#   permute            axes, without the batch axis
#   pad                padding, zeros only
# All spatial attributes are tuples with one entry per spatial axis; padding has (before, after) pairs.
# Global pooling is a pool whose kernel is the map.
OPERATORS = frozenset(
    [
        *("input", "conv", "linear", "batchnorm", "add", "concat", "relu", "relu6", "hardswish", "softmax"),
        *("argmax", "identity", "maxpool", "avgpool", "flatten", "permute", "pad"),
    ]
)
# These give the integers they are given: output format = input format.
FORMAT_KEEPING = frozenset({"maxpool", "flatten", "permute", "pad", "identity", "relu", "relu6"})
ACTIVATIONS = frozenset({"relu", "relu6"})  # fused into the producer when that has no other consumer
FUSABLE = frozenset(
    {"conv", "linear", "add", "avgpool", "batchnorm", "concat"}
)  # producers that an activation fuses into


@dataclass(frozen=True)
class Node:
    """One operator application."""

    name: str  # unique in the graph, a C identifier
    op: str
    inputs: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()  # of the output, without the batch axis
    dtype: str = "float32"
    module: str = ""  # path of the module that made it ("" = the model itself)
    constants: Mapping[str, Array] = field(default_factory=dict)  # float32 values, PyTorch's layout
    params: Mapping[str, str] = field(default_factory=dict)  # constant -> dotted tensor name in the module
    format: Format | None = None  # of the output, once quantised
    weight_format: Format | None = None  # of constants["weight"], once quantised (scales along axis 0)

    @property
    def size(self) -> int:
        """Number of output elements."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.shape else 1


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, with the names of the inputs and outputs."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {n.name: n for n in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """Names of the nodes that read each node, in order."""
        found: dict[str, list[str]] = {n.name: [] for n in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node.name)
        return {k: tuple(v) for k, v in found.items()}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the input nodes."""
        return tuple(n.name for n in self.nodes if n.op == "input")

    def with_nodes(self, nodes: Mapping[str, Node]) -> Graph:
        """Return a copy in which the nodes of these names are replaced."""
        return replace(self, nodes=tuple(nodes.get(n.name, n) for n in self.nodes))

    def fused_into(self, name: str) -> str | None:
        """Return the activation that fuses into node `name` (its only reader), or None."""
        readers = self.consumers[name]
        node = self[name]
        if node.op in FUSABLE and len(readers) == 1 and name not in self.outputs:
            reader = self[readers[0]]
            if reader.op in ACTIVATIONS:
                return reader.name
        return None

    def quantised_points(self) -> tuple[str, ...]:
        """Return the names of the nodes whose output carries a format of its own.

        These are the inputs and every operator that computes new values, but for one whose only reader is an
        activation that fuses into it: then the activation carries the format.
        """
        points = []
        for node in self.nodes:
            if node.op == "argmax" or self.fused_into(node.name):
                continue
            fused = node.op in ACTIVATIONS and self.fused_into(node.inputs[0]) == node.name
            if fused or node.op not in FORMAT_KEEPING:
                points.append(node.name)
        return tuple(points)


# What to use instead of other operators: the first key that is part of the name counts.
_NEAREST = {
    "adaptive": "an output size that divides the map",
    "matmul": "a linear layer or a convolution, whose weights are parameters",
    "view": "reshaping to a vector only, x.flatten(1)",
    "reshape": "reshaping to a vector only, x.flatten(1)",
    "flatten": "reshaping to a vector only, x.flatten(1)",
    "squeeze": "x.flatten(1)",
    "slice": "a pool or a stride",
    "select": "a pool or a stride",
    "chunk": "two layers that both read the whole",
    "split": "two layers that both read the whole",
    "getitem": "two layers that both read the whole",
    "stack": "torch.cat along an axis that is there",
    "copy": "torch.cat instead of writing into a part",
    "fill": "torch.cat instead of writing into a part",
    "linear": "flatten first, or a 1x1 convolution",
    "mul": "a constant factor per channel, or batch norm",
    "sub": "a constant per channel",
    "div": "a constant divisor",
    "neg": "a constant factor per channel",
    "log_softmax": "softmax, or raw outputs",
    "silu": "hardswish or relu",
    "gelu": "hardswish or relu",
    "elu": "relu or relu6",
    "clamp": "relu or relu6",
    "sigmoid": "softmax, hardswish or relu",
    "tanh": "relu6",
    "conv_transpose": "conv",
    "pad": "zero padding of the spatial axes, not negative",
    "max_pool": "a pool without dilation",
    "avg_pool": "a pool without divisor_override",
    "_norm": "batch norm with running statistics",
    "mean": "the mean over the spatial axes",
    "sum": "the mean over the spatial axes",
    "lstm": "convolutions over time",
    "gru": "convolutions over time",
    "rnn": "convolutions over time",
    "add": "inputs of equal shape, or a constant per channel",
}


def refusals(graph: Graph) -> tuple[str, ...]:
    """Return one sentence for each node without a canonical operator: what, where, what to use."""
    return tuple(
        f"{_short(node.op)} ({node.op}) in module '{node.module}', node {node.name}; supported: {nearest(node.op)}"
        for node in graph
        if node.op not in OPERATORS
    )


def nearest(op: str) -> str:
    """Return what to use instead of an operator that is not canonical.

    >>> nearest("aten.gelu.default")
    'hardswish or relu'
    """
    return next((hint for key, hint in _NEAREST.items() if key in _short(op)), ", ".join(sorted(OPERATORS - {"input"})))


def _short(op: str) -> str:
    return op.split(".")[1] if "." in op else op
