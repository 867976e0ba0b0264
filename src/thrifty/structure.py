"""What integer execution and a device ask of an operator's shapes and attributes, whatever its numbers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from thrifty.graph import Graph, Node

__all__ = ["clauses", "whole"]


def clauses(node: Node, graph: Graph) -> Iterator[str]:
    """Yield a clause for each reason of structure not to use a node, each with the nearest supported form.

    >>> list(clauses(Node("r", "relu", ("x",), shape=(2, 3, 3, 1)), Graph((), ())))
    ['its output has shape (2, 3, 3, 1); at most (C, H, W) is supported']
    """
    if len(node.shape) > 3:
        yield f"its output has shape {node.shape}; at most (C, H, W) is supported"
    if node.op in _OF:
        yield from _OF[node.op](node, graph)


def whole(node: Node, axis: int | None) -> bool:
    """Whether `axis` of a node's output holds all its entries."""
    return axis is not None and 0 <= axis < len(node.shape) and node.shape[axis] == node.size


def _axes(node: Node, name: str) -> Iterator[str]:
    axes = len(node.attrs[name])
    if axes not in (1, 2) or len(node.shape) != axes + 1:
        yield f"it has {axes} spatial axes and output shape {node.shape}; (C, L) and (C, H, W) are supported"


def _add(node: Node, graph: Graph) -> Iterator[str]:
    shapes = [graph[name].shape for name in node.inputs]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        yield f"it adds shapes {' and '.join(map(str, shapes))}; two inputs of equal shape are supported"


def _argmax(node: Node, graph: Graph) -> Iterator[str]:
    source, axis = graph[node.inputs[0]], node.attrs.get("axis", 0)
    if not whole(source, axis):
        yield f"it runs along axis {axis} of shape {source.shape}; argmax is supported over a whole vector"
    if graph.consumers[node.name]:
        yield "other operators use its index; an argmax is supported as the last operator only"


def _avgpool(node: Node, graph: Graph) -> Iterator[str]:
    yield from _axes(node, "kernel")
    if any(map(any, node.attrs["padding"])) and not node.attrs.get("count_include_pad", True):
        yield "count_include_pad=False with padding divides windows unequally; use True, or padding=0"
    if node.attrs.get("ceil", False):
        yield "ceil_mode=True divides windows unequally; use ceil_mode=False"


def _concat(node: Node, graph: Graph) -> Iterator[str]:
    if not 0 <= node.attrs["axis"] < len(node.shape) <= 3:
        yield f"it joins along axis {node.attrs['axis']} of shape {node.shape}; use axes of (C, H, W)"


def _conv(node: Node, graph: Graph) -> Iterator[str]:
    if any(d != 1 for d in node.attrs.get("dilation", ())):
        yield f"dilation {tuple(node.attrs['dilation'])}; use dilation 1 with a larger kernel or a stride"
    yield from _axes(node, "stride")


def _linear(node: Node, graph: Graph) -> Iterator[str]:
    shape = graph[node.inputs[0]].shape
    if len(shape) != 1:
        yield f"its input has shape {shape}; flatten it first, or use a convolution of kernel 1"


def _maxpool(node: Node, graph: Graph) -> Iterator[str]:
    yield from _axes(node, "kernel")


def _pad(node: Node, graph: Graph) -> Iterator[str]:
    yield "zero padding on its own; pad directly in front of a convolution, or use its own padding"


def _permute(node: Node, graph: Graph) -> Iterator[str]:
    axes = tuple(node.attrs["axes"])
    if sorted(axes) != list(range(len(node.shape))) or not 1 <= len(axes) <= 3:
        yield f"axes {axes} of shape {node.shape}; an order of (C, H, W), (C, L) or (C,) is supported"


def _softmax(node: Node, graph: Graph) -> Iterator[str]:
    if not whole(node, node.attrs["axis"]):
        axis = node.attrs["axis"]
        yield f"it runs along axis {axis} of shape {node.shape}; softmax is supported over a whole vector"


_OF: dict[str, Callable[[Node, Graph], Iterator[str]]] = {
    "add": _add,
    "argmax": _argmax,
    "avgpool": _avgpool,
    "concat": _concat,
    "conv": _conv,
    "linear": _linear,
    "maxpool": _maxpool,
    "pad": _pad,
    "permute": _permute,
    "softmax": _softmax,
}
