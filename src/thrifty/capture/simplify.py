"""Exact rewrites from graph to graph, after reading."""

from __future__ import annotations

from dataclasses import replace

from thrifty.graph import FUSABLE, Graph, Node


def simplify(graph: Graph) -> Graph:
    """Apply the exact rewrites until nothing changes, and drop what nobody reads."""
    graph = _name_views(graph)
    for rewrite in (_fold_pads, _merge_affine, _raise_relu):
        while (changed := rewrite(graph)) is not None:
            graph = changed
    return alive(graph)


def _name_views(graph: Graph) -> Graph:
    """A reshape to a vector is a flatten; any other keeps an aten name, to be refused where it matters."""
    named = {
        n.name: replace(n, op="flatten" if len(n.shape) == 1 else "aten.view.default")
        for n in graph
        if n.op == "view"
    }
    return graph.with_nodes(named)


def _fold_pads(graph: Graph) -> Graph | None:
    for node in graph:
        pad = graph[node.inputs[0]] if node.op == "conv" else None
        if pad is not None and pad.op == "pad" and pad.format is None:
            both = tuple(
                (a + c, b + d) for (a, b), (c, d) in zip(pad.attrs["padding"], node.attrs["padding"])
            )
            return graph.with_nodes(
                {node.name: replace(node, inputs=pad.inputs, attrs={**node.attrs, "padding": both})}
            )
    return None


def _merge_affine(graph: Graph) -> Graph | None:
    """Merge two batch norms without parameters (constants in the code of the model) into one."""
    for node in graph:
        first = graph[node.inputs[0]] if node.op == "batchnorm" and not node.params else None
        if (
            first is None
            or first.op != "batchnorm"
            or first.params
            or first.format
            or len(graph.consumers[first.name]) > 1
        ):
            continue
        if first.name in graph.outputs:
            continue
        a, b = first.constants, node.constants
        merged = {"scale": a["scale"] * b["scale"], "shift": a["shift"] * b["scale"] + b["shift"]}
        return alive(graph.with_nodes({node.name: replace(node, inputs=first.inputs, constants=merged)}))
    return None


def _raise_relu(graph: Graph) -> Graph | None:
    """Move an activation before a pool, flatten or permute, so that it fuses with the producer."""
    for node in graph:
        if node.op not in ("relu", "relu6"):
            continue
        mover = graph[node.inputs[0]]
        if mover.op not in ("maxpool", "flatten", "permute") or mover.format or mover.name in graph.outputs:
            continue
        if len(graph.consumers[mover.name]) > 1:
            continue
        return _swap(graph, graph[mover.inputs[0]], mover, node)
    return None


def _swap(graph: Graph, source: Node, mover: Node, relu: Node) -> Graph | None:
    if not _would_fuse(graph, source, mover):
        return None
    before = replace(relu, inputs=(source.name,), shape=source.shape, format=None)
    after = replace(mover, inputs=(relu.name,), format=relu.format)
    order: list[Node] = []
    for node in graph:
        if node.name == mover.name:
            order += [before, after]
        elif node.name != relu.name:
            inputs = tuple(mover.name if i == relu.name else i for i in node.inputs)
            order.append(replace(node, inputs=inputs))
    return Graph(tuple(order), tuple(mover.name if o == relu.name else o for o in graph.outputs))


def _would_fuse(graph: Graph, source: Node, mover: Node) -> bool:
    alone = (
        len(graph.consumers[source.name]) == 1 and source.name not in graph.outputs and source.format is None
    )
    return alone and (source.op in FUSABLE or source.op in ("maxpool", "flatten", "permute"))


def alive(graph: Graph) -> Graph:
    """Return the graph without the nodes that no output needs; inputs stay."""
    wanted = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
    return replace(graph, nodes=tuple(n for n in graph if n.name in wanted or n.op == "input"))


def take_names(graph: Graph, reference: Graph) -> Graph:
    """Give nodes the names and modules they have in `reference`, when it is the same network."""
    if len(graph.nodes) != len(reference.nodes):
        return graph
    names = {a.name: b.name for a, b in zip(graph, reference)}
    renamed = [replace(n, name=names[n.name], inputs=tuple(names[i] for i in n.inputs)) for n in graph]
    if any((a.op, a.inputs, a.shape) != (b.op, b.inputs, b.shape) for a, b in zip(renamed, reference)):
        return graph
    nodes = tuple(replace(a, module=b.module) for a, b in zip(renamed, reference))
    return Graph(nodes, tuple(names[o] for o in graph.outputs))
