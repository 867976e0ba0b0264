"""From a graph to a program: the only place that knows both the operators of a network and their integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from thrifty import integer, structure
from thrifty.arith import Format
from thrifty.deploy.ops import LOWERED_BY
from thrifty.deploy.ops.builder import Builder, Value, where
from thrifty.deploy.program import Program
from thrifty.errors import KnobError, UnsupportedModel
from thrifty.graph import FORMAT_KEEPING, Graph, Node, nearest


def lower(graph: Graph, name: str = "model") -> Program:
    """Return the program of a graph: float32 when no node has a format, else integers.

    In float32, batch norms fold into the conv or linear layer before them. Weights become channels-last, and
    activations part of their producers. It is proven here that no sum of an integer program can leave int32.
    Raises UnsupportedModel with one sentence for each thing that cannot be lowered.

    >>> from thrifty.graph import Node
    >>> x = Node("x", "input", shape=(3,))
    >>> lower(Graph((x, Node("y", "relu", ("x",), shape=(3,))), ("y",))).calls[0].op
    'clamp'
    """
    program, refusals = _lower(graph, name)
    if refusals or program is None:
        raise UnsupportedModel(refusals)
    return program


def check(graph: Graph) -> tuple[str, ...]:
    """Return every reason why `lower` would refuse the graph, one sentence each; none when it would not."""
    return _lower(graph, "model")[1]


def _lower(graph: Graph, name: str) -> tuple[Program | None, tuple[str, ...]]:
    """Return the program, or None, and the refusals."""
    integers = any(n.format is not None for n in graph)
    needed = _needed(graph)
    refusals = list(_refuse_whole(graph))
    refused = set()
    for node in graph:
        for clause in _refuse_node(node, graph, integers) if node.name in needed else ():
            refusals.append(f"{where(node)}: {clause}")
            refused.add(node.name)
    folded = graph if integers else _fold_batchnorms(graph)
    b = Builder(folded, integers=integers)
    for node in folded:
        if node.name in needed and node.name not in b.values:
            _lower_node(node, b, node.name in refused)
    refusals += b.refusals
    if refusals:
        return None, tuple(refusals)
    result = folded[folded.outputs[0]]
    classes = result.size if len(result.shape) == 1 and result.op != "argmax" else 0
    buffer = b.values[result.name].buffer
    return Program(name, b.buffers, tuple(b.calls), folded.inputs[0], buffer, classes), ()


def _lower_node(node: Node, b: Builder, refused: bool) -> None:
    """Append the calls of one node, or let a buffer stand for it.

    Behind a node of unknown format nothing more is lowered, only examined, up to the next format.
    """
    try:
        if refused or not b.unknown.isdisjoint(node.inputs):
            _stand_in(node, b)
        elif node.op == "input":
            b.finish(node, _input(node, b))
        else:
            LOWERED_BY[node.op].lower(node, b)
    except KnobError as err:
        b.refuse(node, str(err))
        _stand_in(node, b)


def _input(node: Node, b: Builder) -> Value:
    """Declare the input buffer; where its format is narrower than its type, clamp what the caller wrote."""
    if not b.integers:
        return b.declare(node, None)
    fmt = b.format(node)
    stored = Format(16 if fmt.bits > 8 else 8, fmt.signed, fmt.scale)
    value = b.declare(node, stored)
    if fmt == stored:
        return value
    attrs = {"low": fmt.low, "high": fmt.high}
    return b.call("clamp", node, [value], value.shape, attrs, format=fmt, name=f"{node.name}_clamp")


def _stand_in(node: Node, b: Builder) -> None:
    """Finish a refused node with a value of its shape and format: those behind it are examined too."""
    fmt = integer.output_format(b.graph, node.name) if b.integers else None
    if fmt is not None and (len(fmt.scale) != 1 or (fmt.bits > 8 and not fmt.signed)):
        fmt = None
    b.finish(node, b.declare(node, fmt))
    if b.integers and fmt is None:
        fused = b.fused(node)
        b.unknown.update({node.name} | ({fused.name} if fused else set()))


def _refuse_whole(graph: Graph) -> Iterator[str]:
    """Yield what is wrong with the graph as a whole."""
    for word, names in (("input", graph.inputs), ("output", graph.outputs)):
        if len(names) != 1:
            yield f"the model has {len(names)} {word}s ({', '.join(names)}); wrap it so that it has one"


def _refuse_node(node: Node, graph: Graph, integers: bool) -> Iterator[str]:
    """Yield what is wrong with a node, before it is lowered."""
    yield from structure.clauses(node, graph)
    if 0 in node.shape:
        yield f"its output has shape {node.shape}, without elements"
    if node.dtype not in ("float32", "int64") or (node.dtype == "int64" and node.op != "argmax"):
        yield f"it gives {node.dtype}; float32 is supported"
    if integers:
        yield from _refuse_format(node, graph)
    for key, value in node.constants.items():
        bad = int(np.count_nonzero(~np.isfinite(value))) if np.asarray(value).dtype.kind == "f" else 0
        if bad:
            yield f"its {key} has {bad} values that are NaN or infinite; train again or load other weights"
    if node.op in ("input", "pad"):
        return
    if node.op not in LOWERED_BY:
        yield f"no such operator can be deployed; supported: {nearest(node.op)}"
    else:
        operator = LOWERED_BY[node.op]
        odd = sorted(set(node.attrs) - operator.attrs)
        if odd:
            known = ", ".join(sorted(operator.attrs)) or "none"
            yield f"attributes {', '.join(odd)} are not supported; known: {known}"
        yield from operator.refuse(node, graph)


def _refuse_format(node: Node, graph: Graph) -> Iterator[str]:
    """Yield what is wrong with the format of a node of an integer graph."""
    fmt = integer.output_format(graph, node.name)
    if fmt is None:
        keeps = node.op in FORMAT_KEEPING and node.format is None
        if node.op != "argmax" and not keeps:  # a keeper has none because what it reads has none
            yield "its output has no format, although others have; quantise the whole model"
    elif len(fmt.scale) != 1:
        yield f"its output has {len(fmt.scale)} scales; activations have one"
    elif not fmt.signed and fmt.bits > 8:
        yield f"its output is unsigned with {fmt.bits} bits; unsigned formats have at most 8"


def _needed(graph: Graph) -> set[str]:
    """Return the nodes that the first output depends on, and the inputs."""
    found = set(graph.inputs)
    todo = list(graph.outputs)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo.extend(graph[name].inputs)
    return found


def _fold_batchnorms(graph: Graph) -> Graph:
    """Return the graph with every batch norm folded into the conv or linear layer that it alone reads."""
    merged: dict[str, Node] = {}
    gone: dict[str, str] = {}
    for node in graph:
        source = graph[node.inputs[0]] if node.op == "batchnorm" else None
        if source is None or source.op not in ("conv", "linear") or source.name in graph.outputs:
            continue
        if len(graph.consumers[source.name]) == 1 and _fits(node, source):
            merged[source.name] = _folded(source, node)
            gone[node.name] = source.name
    nodes = [merged.get(n.name, n) for n in graph if n.name not in gone]
    nodes = [replace(n, inputs=tuple(gone.get(i, i) for i in n.inputs)) for n in nodes]
    return Graph(tuple(nodes), tuple(gone.get(o, o) for o in graph.outputs))


def _fits(norm: Node, layer: Node) -> bool:
    channels = (len(layer.constants["weight"]),)
    return norm.constants["scale"].shape == channels == norm.constants["shift"].shape


def _folded(layer: Node, norm: Node) -> Node:
    """Return the layer with weight * scale and bias * scale + shift, computed in float64."""
    scale = norm.constants["scale"].astype(np.float64)
    weight = layer.constants["weight"].astype(np.float64)
    bias = layer.constants.get("bias", np.zeros(len(weight))).astype(np.float64)
    constants = {
        "weight": (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.float32),
        "bias": (bias * scale + norm.constants["shift"].astype(np.float64)).astype(np.float32),
    }
    return replace(layer, constants=constants, params={})
