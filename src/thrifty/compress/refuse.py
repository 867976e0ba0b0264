"""What Quantize refuses, in words: operators without an integer form, and models that cannot be copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import prune

from thrifty import structure
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
    yield from structure.clauses(node, graph)
    if node.op != "input" and node.op not in FLOAT:
        yield f"{node.op} has no integer form; supported: {nearest(node.op)}"
        return
    if node.op in WEIGHTED and "weight" not in node.params:
        yield f"the weight of this {node.op} is no parameter but a computed or fixed tensor; make it an nn.Parameter"
    if node.op in _TOO_WIDE and bits > 8:
        yield f"{node.op} takes 8 bits or fewer, not {bits}; {_TOO_WIDE[node.op]}"
    if node.op == "softmax" and node.size > SOFTMAX_LARGEST:
        yield f"softmax of {node.size} values; at most {SOFTMAX_LARGEST} are supported"


_TOO_WIDE = {"hardswish": "use ReLU or ReLU6", "softmax": "leave it out: the largest score stays so"}

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
