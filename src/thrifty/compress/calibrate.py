"""Set the ranges of a QuantizedModel from data, and correct its biases for the mean error of rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from thrifty.compress.points import WEIGHTED
from thrifty.compress.quantized_model import QuantizedModel
from thrifty.compress.ranges import activation_magnitude, scale_of, weight_magnitudes, weight_shares
from thrifty.compress.scales import lost_ranges, sums_fit, update_scales
from thrifty.errors import DataError, UnsupportedModel
from thrifty.graph import Graph, Node

BATCH = 64
HEADROOM = 1.25  # of ranges of more than 8 bits: a step costs little there, a value beyond the range much
FEW_BITS = 3  # of weights: here clipping the largest pays, above it does not (measured on the zoo)
KEPT = 16384  # values of one tensor and one batch that stay for choosing its range


def set_weight_ranges(model: QuantizedModel, ranges: str) -> None:
    """Choose the share of its largest magnitude that each weight's range keeps (weight_shares)."""
    for name in model.sites:
        quantizer, weight = model.weight_quantizer(name), model.float_weight(name)
        how = ("mse" if quantizer.bits <= FEW_BITS else "minmax") if ranges == "auto" else ranges
        arguments = (quantizer.bits, model.arithmetic.scales, how, quantizer.axis == 0)
        quantizer.ratio.copy_(weight_shares(weight, *arguments))


def set_activation_ranges(model: QuantizedModel, x: Tensor, ranges: str, percentile: float) -> None:
    """Set the scale of every activation, then of every weight.

    x: (n, ...) calibration inputs; ranges, percentile: see Quantize. Raises DataError for a value that is
    not finite, KnobError for a scale beyond float32, UnsupportedModel for layers whose sums in int32 leave
    nothing of their range.
    """
    calibrated = {}
    for name, seen in _observe(model, x).items():
        point = model.point(name)
        # saturating a score could change the class, so an output keeps its largest value
        how = "minmax" if _is_score(model.graph, name) else ranges
        top = activation_magnitude(seen, point.bits, point.signed, model.arithmetic.scales, how, percentile)
        top *= HEADROOM if point.bits > 8 else 1.0
        point.scale.fill_(scale_of(top, point.bits, point.signed, model.arithmetic.scales))
        calibrated[name] = float(point.scale)
    update_scales(model)
    if lost := lost_ranges(model, calibrated):
        raise UnsupportedModel(lost)


def common_scale(model: QuantizedModel, x: Tensor) -> float:
    """Return the finest power of two that holds every weight, every activation seen, and every sum in int32."""
    tops = [float(v.abs().max()) for v in _observe(model, x).values()]
    tops += [float(weight_magnitudes(model.float_weight(n), False)) for n in model.sites]
    scale = scale_of(max(tops), model.arithmetic.bits, True, "power_of_two")
    while not sums_fit(model, scale):
        scale *= 2
    return scale


def set_fixed_scale(model: QuantizedModel, scale: float) -> None:
    """Give every weight and every activation but softmax this scale, for good."""
    model.arithmetic = replace(model.arithmetic, fixed_scale=scale)
    for node in model.graph:
        if model.has_point(node.name) and node.op != "softmax":
            model.point(node.name).scale.fill_(scale)
    for name in model.sites:
        model.weight_quantizer(name).scale.fill_(scale)


def correct_biases(model: QuantizedModel, x: Tensor) -> None:
    """Add to every bias the mean of what rounding takes from its layer's output, layer after layer.

    x: (n, ...) calibration inputs. A layer without bias, or one that is called twice, stays as it is.
    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction,
    section 4.2 (arXiv:1906.04721), here with measured means.
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
    update_scales(model)


def _observe(model: QuantizedModel, x: Tensor) -> dict[str, Tensor]:
    """Run in float; return a random part of the values of each point and their largest (1-D)."""
    observer = _Observer(model)
    with torch.no_grad():
        for batch in torch.split(x, BATCH):
            observer.batch = batch
            model.walk(observer.step)
    return {name: torch.cat(values) for name, values in observer.kept.items()}


class _Observer:
    """Runs a model in float, one batch after another, and keeps values of its points."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.batch = torch.empty(0)
        self.kept: dict[str, list[Tensor]] = {}
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
        return y


def _is_score(graph: Graph, name: str) -> bool:
    """Whether the values of a point are scores: given as they are, or through softmax or argmax."""
    readers = graph.consumers[name]
    return name in graph.outputs or any(graph[r].op in ("softmax", "argmax") for r in readers)
