"""Fold batch normalisation into the layer before it; turn the rest into depthwise 1x1 convolutions.

The tree of module names stays: a folded batch norm becomes nn.Identity, another one nn.Conv1d or nn.Conv2d.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty.capture import capture
from thrifty.errors import DataError, UnsupportedModel
from thrifty.graph import Graph, Node

_Norm = nn.modules.batchnorm._BatchNorm
_Layer = (nn.Conv1d, nn.Conv2d, nn.Linear)


def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the model without batch normalisation; in eval mode it computes what it did, up to float
    rounding.

    model: changed in place; example: (1, ...) input. A layer folds when both it and its batch norm run once
    and nothing else reads what is between them. Raises UnsupportedModel for a batch norm over a vector that
    cannot fold, DataError for a running variance below zero.
    """
    norms = {name for name, m in model.named_modules() if isinstance(m, _Norm)}
    if not norms:
        return model
    _refuse_variances(model)
    graph = capture(model, example)
    calls = Counter(node.module for node in graph if node.op in ("batchnorm", "conv", "linear"))
    refusals = []
    done = set()
    for node in graph:
        if node.op != "batchnorm" or node.module not in norms or node.module in done:
            continue
        done.add(node.module)
        layer = _foldable(model, graph, node, calls)
        if layer is not None:
            _fold(layer, node)
            _replace(model, node.module, nn.Identity())
        elif len(node.shape) == 1:
            refusals.append(
                f"{node.module}: a batch norm over a vector must follow a Linear that nothing else uses; "
                "move it behind one, or remove it"
            )
        else:
            _replace(model, node.module, _depthwise(node))
    if refusals:
        raise UnsupportedModel(refusals)
    return model


def _refuse_variances(model: nn.Module) -> None:
    """Refuse batch norms whose scale has no real value: folding would blame the layer before them."""
    bad = []
    for name, m in model.named_modules():
        var = m.running_var if isinstance(m, _Norm) else None
        if var is not None and not bool((var + m.eps > 0).all()):
            bad.append(f"{name}.running_var reaches {float(var.min()):g}")
    if bad:
        raise DataError(
            f"{'; '.join(bad)}, but a variance is never below zero; train again, load other weights, "
            "or reset the statistics and estimate them anew"
        )


def _foldable(model: nn.Module, graph: Graph, norm: Node, calls: Counter[str]) -> nn.Module | None:
    """Return the layer that feeds this batch norm, if folding is exact."""
    before = graph[norm.inputs[0]]
    alone = len(graph.consumers[before.name]) == 1 and before.name not in graph.outputs
    if before.op not in ("conv", "linear") or not alone or calls[before.module] > 1 or calls[norm.module] > 1:
        return None
    layer = model.get_submodule(before.module)
    if not isinstance(layer, _Layer):  # F.conv2d or F.linear in a module's own forward
        return None
    owners = [m for m in model.modules() if getattr(m, "weight", None) is layer.weight]
    if len(owners) > 1:  # another layer has the same weight
        return None
    plain = not parametrize.is_parametrized(layer)
    return layer if plain and before.params.get("weight", "").endswith("weight") else None


def _fold(layer: nn.Module, norm: Node) -> None:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    scale = torch.from_numpy(norm.constants["scale"]).to(weight)
    shift = torch.from_numpy(norm.constants["shift"]).to(weight)
    with torch.no_grad():
        weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))
        if isinstance(bias, Tensor):
            bias.copy_(bias * scale + shift)
        else:
            layer.bias = nn.Parameter(shift.clone())


def _depthwise(norm: Node) -> nn.Module:
    """Return the convolution that multiplies each channel by its scale and adds its shift."""
    channels = norm.shape[0]
    kind = nn.Conv1d if len(norm.shape) == 2 else nn.Conv2d
    layer = kind(channels, channels, 1, groups=channels)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(norm.constants["scale"]).reshape(layer.weight.shape))
        assert layer.bias is not None
        layer.bias.copy_(torch.from_numpy(norm.constants["shift"]))
    return layer


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
