"""What Quantize refuses, in words: operators without an integer form, and models that cannot be copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils import prune

from thrifty.compress.execute import FLOAT
from thrifty.compress.points import WEIGHTED
from thrifty.errors import Incompatible
from thrifty.graph import Graph, Node, nearest
from thrifty.integer import SOFTMAX_LARGEST

# --- operators ---


def refusals(graph: Graph, bits: int) -> Iterator[str]:
    """Give a sentence for each reason why the graph has no integer form with activations of `bits` bits.

    What a deployed program refuses by structure alone is refused here too, before any calibration or training.
    """
    for node in graph:
        for clause in _clauses(node, graph, bits):
            yield f"{where(node)}: {clause}"


def where(node: Node) -> str:
    """Return how sentences name a node."""
    return f"{node.module or 'the model'} ({node.name})"


def _clauses(node: Node, graph: Graph, bits: int) -> Iterator[str]:
    if len(node.shape) > 3:
        yield f"its output has shape {node.shape}; at most (C, H, W) is supported"
    if node.op != "input" and node.op not in FLOAT:
        yield f"{node.op} has no integer form; supported: {nearest(node.op)}"
        return
    if node.op in WEIGHTED and "weight" not in node.params:
        yield f"the weight of this {node.op} is no parameter but a computed or fixed tensor; make it an nn.Parameter"
    if node.op in _TOO_WIDE and bits > 8:
        yield f"{node.op} takes 8 bits or fewer, not {bits}; {_TOO_WIDE[node.op]}"
    if node.op in _STRUCTURE:
        yield from _STRUCTURE[node.op](node, graph)


_TOO_WIDE = {"hardswish": "use ReLU or ReLU6", "softmax": "leave it out: the largest score stays so"}


def _axes(node: Node, name: str) -> Iterator[str]:
    axes = len(node.attrs[name])
    if axes > 2 or len(node.shape) != axes + 1:
        yield f"it has {axes} spatial axes and output shape {node.shape}; (C, L) and (C, H, W) are supported"


def _add(node: Node, graph: Graph) -> Iterator[str]:
    shapes = [graph[name].shape for name in node.inputs]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        yield f"it adds shapes {' and '.join(map(str, shapes))}; two inputs of equal shape are supported"


def _argmax(node: Node, graph: Graph) -> Iterator[str]:
    if not _whole(graph[node.inputs[0]], node.attrs.get("axis", 0)):
        yield f"argmax of shape {graph[node.inputs[0]].shape}; it is supported over a whole vector"
    if graph.consumers[node.name]:
        yield "other operators use the index of this argmax; it must be the last operator"


def _avgpool(node: Node, graph: Graph) -> Iterator[str]:
    yield from _axes(node, "kernel")
    if any(map(any, node.attrs["padding"])) and not node.attrs.get("count_include_pad", True):
        yield "count_include_pad=False with padding divides windows unequally; use True, or padding=0"
    if node.attrs.get("ceil", False):
        yield "ceil_mode=True divides windows unequally; use ceil_mode=False"


def _conv(node: Node, graph: Graph) -> Iterator[str]:
    if any(d != 1 for d in node.attrs.get("dilation", ())):
        yield f"dilation {tuple(node.attrs['dilation'])}; use dilation 1 with a larger kernel or a stride"
    yield from _axes(node, "stride")


def _linear(node: Node, graph: Graph) -> Iterator[str]:
    shape = graph[node.inputs[0]].shape
    if len(shape) != 1:
        yield f"a linear layer over shape {shape}; flatten it first, or use a convolution of kernel 1"


def _maxpool(node: Node, graph: Graph) -> Iterator[str]:
    yield from _axes(node, "kernel")


def _pad(node: Node, graph: Graph) -> Iterator[str]:
    yield "zero padding on its own; pad directly in front of a convolution, or use its own padding"


def _softmax(node: Node, graph: Graph) -> Iterator[str]:
    if not _whole(node, node.attrs["axis"]):
        yield f"softmax along axis {node.attrs['axis']} of shape {node.shape}; it is supported over a whole vector"
    elif node.size > SOFTMAX_LARGEST:
        yield f"softmax of {node.size} values; at most {SOFTMAX_LARGEST} are supported"


def _whole(node: Node, axis: int | None) -> bool:
    return axis is not None and 0 <= axis < len(node.shape) and node.shape[axis] == node.size


_STRUCTURE: dict[str, Callable[[Node, Graph], Iterator[str]]] = {
    "add": _add,
    "argmax": _argmax,
    "avgpool": _avgpool,
    "conv": _conv,
    "linear": _linear,
    "maxpool": _maxpool,
    "pad": _pad,
    "softmax": _softmax,
}

# --- copies ---


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy.

    Raises Incompatible, with what to do, where torch cannot copy: a weight that hooks compute from others.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as err:
        bad = [f"{name or 'the model'}: {advice}" for name, m in model.named_modules() for advice in _computed(m)]
        if not bad:
            raise Incompatible(f"the model cannot be copied: {err}") from err
        raise Incompatible("the model cannot be copied; " + "; ".join(bad)) from err


def _computed(module: nn.Module) -> Iterator[str]:
    """Yield what to do about each tensor of a module that is no leaf, and so cannot be copied."""
    hooks = {type(h).__name__: h for h in module._forward_pre_hooks.values()}
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor) and not value.is_leaf:
            if any(isinstance(h, prune.BasePruningMethod) for h in hooks.values()):
                yield f"call torch.nn.utils.prune.remove(module, '{name}') first, which keeps the zeros"
            elif "WeightNorm" in hooks:
                yield "call torch.nn.utils.remove_weight_norm(module) first, or use parametrizations.weight_norm"
            elif "SpectralNorm" in hooks:
                yield "call torch.nn.utils.remove_spectral_norm(module) first, or use parametrizations.spectral_norm"
            else:
                yield f"'{name}' is computed from other tensors and kept; make it an nn.Parameter or detach() it"
