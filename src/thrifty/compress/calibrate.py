"""Set the ranges of a QuantizedModel from data, and correct its biases for the mean error of rounding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from thrifty.compress.quantized_model import WEIGHTED, QuantizedModel, weights_of
from thrifty.compress.ranges import activation_magnitude, scale_of, weight_magnitudes, weight_shares
from thrifty.errors import DataError
from thrifty.graph import Graph, Node

BATCH = 64
KEPT = 16384  # values of one tensor and one batch that stay for choosing its range


def set_ranges(model: QuantizedModel, graph: Graph, x: Tensor, ranges: str, percentile: float) -> None:
    """Set the scale of every weight and every activation.

    graph: of the float model, with constants; x: (n, ...) calibration inputs; ranges, percentile: see Quantize.
    Raises DataError when a value is not finite.
    """
    fixed = model.arithmetic.fixed_scale
    if fixed is not None:
        set_fixed_scale(model, fixed)
        return
    for name in weights_of(graph):
        quantizer, weight = model.weight_quantizer(name), model.float_weight(name)
        arguments = (quantizer.bits, model.arithmetic.scales, ranges, quantizer.axis == 0)
        quantizer.ratio.copy_(weight_shares(weight, *arguments))
    values, reach = _observe(model, x)
    for name, seen in values.items():
        point = model.point(name)
        # saturating a score could change the class, so an output keeps its largest value
        how = "minmax" if _is_output(model.graph, name) else ranges
        top = activation_magnitude(seen, point.bits, point.signed, model.arithmetic.scales, how, percentile)
        point.reach.fill_(reach[name])
        point.share.fill_(top / reach[name] if reach[name] > 0 else 1.0)
        point.scale.fill_(scale_of(top, point.bits, point.signed, model.arithmetic.scales))
    model.update_scales()


def set_common_scale(model: QuantizedModel, graph: Graph, x: Tensor) -> float:
    """Return the one power-of-two scale that holds every weight and every activation of the network."""
    values, _ = _observe(model, x)
    tops = [float(v.abs().max()) for v in values.values()]
    tops += [float(weight_magnitudes(model.float_weight(n), False)) for n in weights_of(graph)]
    return scale_of(max(tops), model.arithmetic.bits, True, "power_of_two")


def set_fixed_scale(model: QuantizedModel, scale: float) -> None:
    """Give every weight and every activation but softmax this scale."""
    for node in model.graph:
        if model.has_point(node.name) and node.op != "softmax":
            model.point(node.name).scale.fill_(scale)
        if node.op in WEIGHTED:
            model.weight_quantizer(node.params["weight"]).scale.fill_(scale)


def correct_biases(model: QuantizedModel, x: Tensor) -> None:
    """Add to every bias the mean of what rounding takes from its layer's output, layer after layer.

    x: (n, ...) calibration inputs. A layer without bias, or one that is called twice, stays as it is.
    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.2
    (arXiv:1906.04721), here with measured means.
    """
    calls = [n.params["weight"] for n in model.graph if n.op in WEIGHTED]

    def step(node: Node, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if node.op == "input":
            real = rounded = x
        else:
            real = model.float_step(node, [p[0] for p in pairs], {}, rounded=False)
            rounded = model.float_step(node, [p[1] for p in pairs], {})
        bias = model.bias(node) if node.op in WEIGHTED else None
        if bias is not None and calls.count(node.params["weight"]) == 1:
            missing = (real - rounded).transpose(0, 1).flatten(1).mean(1)
            bias.add_(missing)
            rounded = rounded + missing.reshape(-1, *[1] * (rounded.dim() - 2))
        return real, model.point(node.name)(rounded) if model.has_point(node.name) else rounded

    with torch.no_grad():
        model.walk(step)
    model.update_scales()


def _observe(model: QuantizedModel, x: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Run in float; return a random part of each point's values (1-D), and the mean over batches of the largest."""
    observer = _Observer(model)
    with torch.no_grad():
        for batch in torch.split(x, BATCH):
            observer.batch = batch
            model.walk(observer.step)
    kept = {name: torch.cat(values) for name, values in observer.kept.items()}
    return kept, {name: float(np.mean(tops)) for name, tops in observer.tops.items()}


class _Observer:
    """Runs a model in float, one batch after another, and keeps values of its points."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.batch = torch.empty(0)
        self.kept: dict[str, list[Tensor]] = {}
        self.tops: dict[str, list[float]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def step(self, node: Node, inputs: list[Tensor]) -> Tensor:
        """Compute a node, and keep a random part of its values and their largest."""
        y = self.batch if node.op == "input" else self.model.float_step(node, inputs, {}, rounded=False)
        if self.model.has_point(node.name) and node.op != "softmax":
            flat = y.flatten()
            top = flat.abs().max()
            if not bool(torch.isfinite(top)):
                where = node.module or node.name
                raise DataError(f"{where}: the model gives NaN or infinite values; train it again")
            rows = torch.randint(len(flat), (KEPT,), generator=self.generator)
            few = flat if len(flat) <= KEPT else flat[rows]
            self.kept.setdefault(node.name, []).extend([few, flat[flat.abs().argmax()].reshape(1)])
            self.tops.setdefault(node.name, []).append(float(top))
        return y


def _is_output(graph: Graph, name: str) -> bool:
    """Whether the values of a point are scores: given as they are, or through softmax or argmax."""
    readers = graph.consumers[name]
    return name in graph.outputs or any(graph[r].op in ("softmax", "argmax") for r in readers)
