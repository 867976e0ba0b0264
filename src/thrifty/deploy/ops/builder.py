"""The state of one lowering: values made so far, buffers, calls, shared constants, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty import integer
from thrifty.arith import Format
from thrifty.deploy.program import Array, Buffer, Call
from thrifty.errors import KnobError
from thrifty.graph import ACTIVATIONS, Graph, Node

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Value:
    """What a node of the graph has become: a buffer, and what is known of its contents."""

    buffer: str
    shape: Shape  # (H, W, C)
    format: Format | None  # None: float32
    low: float  # what its elements cannot leave
    high: float
    flat_of: Shape | None = None  # a flattened map whose elements lie in (H, W, C) order: its shape


class Builder:
    """Collects the calls of a program while the operators lower the nodes of a graph in order."""

    def __init__(self, graph: Graph, *, integers: bool) -> None:
        self.graph = graph
        self.integers = integers
        self.values: dict[str, Value] = {}
        self.buffers: dict[str, Buffer] = {}
        self.calls: list[Call] = []
        self.refusals: list[str] = []
        self.unknown: set[str] = set()  # refused nodes whose format is not known
        self._shared: dict[tuple[str, tuple[int, ...], bytes], Array] = {}
        self._taken = {n.name for n in graph}

    # --- reading the graph ---

    def source(self, node: Node, index: int = 0) -> Value:
        """Return the value of an input of `node`."""
        return self.values[node.inputs[index]]

    def format(self, node: Node) -> Format:
        """Return the format of the output of an integer node (that of its fused activation)."""
        fmt = integer.output_format(self.graph, node.name)
        if fmt is None or len(fmt.scale) != 1:
            raise KnobError("its output has no format of one scale")
        return fmt

    def scale_of(self, value: Value) -> float:
        """Return the real value of one unit; 1 in float programs."""
        return 1.0 if value.format is None else value.format.scale[0]

    def fused(self, node: Node) -> Node | None:
        """Return the activation that is computed within `node`."""
        name = self.graph.fused_into(node.name)
        alone = node.op == "maxpool" and node.format is None and node.name not in self.graph.outputs
        if name is None and alone:
            readers = [self.graph[r] for r in self.graph.consumers[node.name]]
            if len(readers) == 1 and readers[0].op in ACTIVATIONS and readers[0].format is None:
                return readers[0]
        return None if name is None else self.graph[name]

    def limits(self, node: Node) -> tuple[Any, Any]:
        """Return (low, high) to which the output of `node` is clamped: integers, in float programs floats."""
        fused = self.fused(node)
        activation = fused.op if fused else (node.op if node.op in ACTIVATIONS else None)
        if self.integers:
            return integer.clamp_limits(self.format(node), activation)
        return (0.0 if activation else -math.inf), (6.0 if activation == "relu6" else math.inf)

    # --- writing the program ---

    def refuse(self, node: Node, clause: str) -> None:
        """Note that `node` cannot be lowered."""
        self.refusals.append(f"{where(node)}: {clause}")

    def shared(self, values: npt.ArrayLike, dtype: str) -> Array:
        """Return a read-only array of these values; equal arrays are one object, so that C has one copy."""
        array = np.ascontiguousarray(values, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._shared:
            array = array.copy() if array is values else array
            array.setflags(write=False)
            self._shared[key] = array
        return self._shared[key]

    def call(
        self,
        op: str,
        node: Node,
        inputs: Sequence[Value],
        shape: Shape,
        attrs: Mapping[str, Any],
        constants: Mapping[str, Array] | None = None,
        *,
        format: Format | None = None,
        dtype: str | None = None,
        macs: int = 0,
        name: str = "",
    ) -> Value:
        """Append a call with an output buffer of its own and return the value it makes.

        format: of the output (None: float32, or dtype); name: of the call, when not that of the node.
        The limits of the value come from attrs low and high, else from the format.
        """
        name = self.fresh(name) if name else node.name
        kind = dtype or (integer.storage(format) if format else "float32")
        scale = format.scale[0] if format else 1.0
        buffer = Buffer(self.fresh(f"{name}_out"), shape, kind, scale, node.module)
        self.buffers[buffer.name] = buffer
        self.calls.append(
            Call(op, name, tuple(v.buffer for v in inputs), buffer.name, dict(attrs), dict(constants or {}),
                 node.module, macs)
        )  # fmt: skip
        low, high = (format.low, format.high) if format else (-math.inf, math.inf)
        return Value(buffer.name, shape, format, attrs.get("low", low), attrs.get("high", high))

    def declare(self, node: Node, format: Format | None) -> Value:
        """Add the buffer of an input node (or the stand-in of a refused node) and return its value."""
        kind = integer.storage(format) if format else "float32"
        shape = hwc(node.shape)
        name = node.name if node.op == "input" else self.fresh(f"{node.name}_out")
        self.buffers[name] = Buffer(name, shape, kind, format.scale[0] if format else 1.0, node.module)
        low, high = (format.low, format.high) if format else (-math.inf, math.inf)
        return Value(name, shape, format, low, high)

    def finish(self, node: Node, value: Value) -> None:
        """Say that `node`, and the activation computed within it, gives `value`."""
        self.values[node.name] = value
        fused = self.fused(node)
        if fused is not None:
            self.values[fused.name] = value

    def fresh(self, name: str) -> str:
        """Return `name`, or with underscores behind it until no node, call or buffer is called so."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def hwc(shape: tuple[int, ...]) -> Shape:
    """Return the buffer shape (H, W, C) of a channels-first shape of at most three axes.

    >>> hwc((3, 8, 6)), hwc((3, 8)), hwc((3,)), hwc(())
    ((8, 6, 3), (1, 8, 3), (1, 1, 3), (1, 1, 1))
    """
    if len(shape) == 3:
        return shape[1], shape[2], shape[0]
    if len(shape) == 2:
        return 1, shape[1], shape[0]
    return 1, 1, math.prod(shape)


def where(node: Node) -> str:
    """Return the words that name a node in a refusal."""
    module = f"module '{node.module}'" if node.module else "the model itself"
    return f"{node.op} in {module} (node '{node.name}')"
