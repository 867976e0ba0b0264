"""Keep the weight scales of a QuantizedModel in step with its weights, and every accumulator inside int32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thrifty import integer
from thrifty.compress.ranges import scales_of, weight_magnitudes
from thrifty.compress.refuse import where
from thrifty.errors import KnobError
from thrifty.graph import Node

if TYPE_CHECKING:
    from thrifty.compress.quantized_model import QuantizedModel

LIMIT = 2**31  # accumulators stay in [-LIMIT, LIMIT)
SUM_RATIO = 2.0**13  # an input of an addition or mean has at most this many times the scale of the output
PRODUCT_RATIO = 2.0**14  # and the product of input and weight scale this many times
LEAST_LEVELS = 4  # of the integers of an activation: with fewer, the network's answers mean nothing
OUT_RATIO = 2.0**-27  # the scale of an output is at least this share of what its layer can reach


def update_scales(model: QuantizedModel) -> None:
    """Derive every weight's scale from the weight as it is now, so that ranges can shrink as well as grow.

    A scale is raised where an accumulator could otherwise leave int32, or a multiplier its range. Models
    with one scale for the whole network keep it. Raises KnobError that names each layer whose scale is too large
    or too small for float32.
    """
    if model.arithmetic.fixed_scale is not None:
        return
    refuse_unusable(model)
    bad = []
    with torch.no_grad():
        for name, nodes in model.sites.items():
            try:
                _update_weight(model, name, nodes)
            except KnobError as err:
                bad.append(f"{where(nodes[0])}: {err}")
        if bad:
            raise KnobError("; ".join(bad))
        for node in model.graph:
            if node.op in ("add", "concat", "avgpool"):
                largest = max(model.format_of(i).scale[0] for i in node.inputs)
                _raise_scale(model, node, largest / SUM_RATIO)
            elif node.op == "batchnorm":
                _raise_scale(model, node, _least_after_batchnorm(model, node))


def refuse_unusable(model: QuantizedModel) -> None:
    """Raise KnobError that names each activation whose scale is NaN, or too large or too small for float32."""
    bad = []
    for node in model.graph:
        try:
            _ = model.point(node.name).format if model.has_point(node.name) else None
        except KnobError as err:
            bad.append(f"{where(model.layer_of(node.name))}: {err}")
    if bad:
        raise KnobError("; ".join(bad))


def lost_ranges(model: QuantizedModel, calibrated: dict[str, float]) -> list[str]:
    """Return a sentence for each layer whose output scale had to grow so far that few of its levels are left.

    calibrated: the scales before `update_scales`, by the name of the point. Layers behind a named one suffer from
    it, and are not named.
    """
    bad: list[str] = []
    behind: set[str] = set()
    for node in model.graph:
        if not behind.isdisjoint(node.inputs):
            behind.add(node.name)
        elif node.name in calibrated:
            before, fmt = calibrated[node.name], model.point(node.name).format
            after = fmt.scale[0]
            if after > before and fmt.high * before / after < min(LEAST_LEVELS, fmt.high / 2):
                behind.add(node.name)
                bad.append(
                    f"{where(model.layer_of(node.name))}: its range is {fmt.high * before:.3g}, but its sums may reach "
                    f"so much more that int32 needs steps of {after:.3g}; make its weights, biases or inputs smaller"
                )
    return bad


def _update_weight(model: QuantizedModel, name: str, nodes: list[Node]) -> None:
    quantizer, weight = model.weight_quantizer(name), model.float_weight(name)
    per_channel = quantizer.axis == 0
    tops = weight_magnitudes(weight, per_channel) * quantizer.ratio
    scale = scales_of(tops, quantizer.bits, True, model.arithmetic.scales).to(weight.device)
    for node in nodes:
        least = _least_scale(model, node, weight, scale)
        scale = torch.maximum(scale, least if per_channel else least.max().reshape(1))
    if model.arithmetic.scales == "power_of_two":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    quantizer.scale.copy_(scale)
    _ = quantizer.format  # refuses scales that are NaN, too large or too small


def _least_scale(model: QuantizedModel, node: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Return for each output channel the weight scale s below which its sums might leave int32: (Co,).

    From |sum| <= sum(|w|/s + 1/2) X + |b|/(s_in s) + s_out/(2 s_in s) < 2^31, X the largest input integer;
    and from the left shift before a multiplication, by at most 4 max(s) s_in / s_out, with the same bound.
    """
    source = model.format_of(node.inputs[0])
    largest, rows = max(-source.low, source.high), weight.abs().reshape(len(weight), -1)
    reach = rows.sum(1).double() * largest * source.scale[0]
    bias = model.bias(node)
    if bias is not None:
        reach = reach + bias.detach().abs().double()
    _raise_scale(model, node, float(reach.max()) * OUT_RATIO)
    _raise_scale(model, node, float(scale.max()) * source.scale[0] / PRODUCT_RATIO)
    out = model.format_of(node.name).scale[0]
    room = (LIMIT - largest * rows.shape[1] / 2 - 16) * (1 - 1e-6)
    sums = (reach + out / 2) / (source.scale[0] * room)
    shifted = 4 * float(scale.max()) * (reach + out / 2) / (out * room)
    return torch.maximum(sums, shifted).float()


def sums_fit(model: QuantizedModel, scale: float) -> bool:
    """Whether every accumulator stays inside int32 when all tensors have this one scale."""
    largest = 1 << (model.arithmetic.bits - 1)
    for name, nodes in model.sites.items():
        rows = model.float_weight(name).detach().abs().flatten(1).double()
        sums = (rows / scale + 0.5).sum(1) * largest
        for node in nodes:
            bias = model.bias(node)
            offset = 0.0 if bias is None else bias.detach().abs().double() / scale**2
            if float((sums + offset).max()) + 0.5 / scale >= LIMIT:
                return False
    return True


def _least_after_batchnorm(model: QuantizedModel, node: Node) -> float:
    source = model.format_of(node.inputs[0])
    scale, shift = (t.cpu().numpy() for t in model.constants_of(node))
    return integer.least_out_scale(scale.reshape(-1, 1), shift, (source.scale[0], source.low, source.high))


def _raise_scale(model: QuantizedModel, node: Node, least: float) -> None:
    """Make the scale of a node's output at least this large."""
    scale = model.point(model.point_of(node.name)).scale
    if not least <= 2.0**126:
        raise KnobError(f"its sums need steps of {least:g}, beyond float32; make its weights, biases or inputs smaller")
    if float(scale) < least:
        power_of_two = model.arithmetic.scales == "power_of_two"
        scale.fill_(2.0 ** math.ceil(math.log2(least)) if power_of_two else least)
