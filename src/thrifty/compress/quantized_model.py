"""A model that computes in the integers of its deployed program, and that trains in their float shadow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty import integer
from thrifty.arith import Format
from thrifty.capture import capture
from thrifty.compress.execute import FLOAT, Exact, exact_constants, run_exact
from thrifty.compress.fake_quantize import WeightQuantizer, fake_quantize, integers
from thrifty.compress.fold import fold_batch_norms
from thrifty.compress.ranges import scale_of, scales_of, weight_magnitudes
from thrifty.errors import StoreError, UnsupportedModel, close_to
from thrifty.graph import Graph, Node

SUM_RATIO = 8192  # an input of an addition has at most this many times the scale of the output
OUT_RATIO = 2.0**-27  # the scale of an output is at least this share of what its layer can reach
LIMIT = 2**31  # accumulators stay in [-LIMIT, LIMIT)
MOMENTUM = 0.95  # of the running mean of the largest magnitude of a batch, in training
WEIGHTED = ("conv", "linear")
_NOT_NEGATIVE = ("relu", "relu6", "softmax")
_PASSES_SIGN = ("maxpool", "avgpool", "flatten", "permute", "pad", "identity", "add", "concat")


@dataclass(frozen=True)
class Arithmetic:
    """The choices of Quantize that stay with the model: how it stores and scales."""

    bits: int = 8  # of activations
    scales: str = "multiplier"  # "multiplier" | "power_of_two"
    per_channel: bool = True  # weights have a scale per output channel
    rounding: str = "half_up"
    unsigned: bool = True  # 8 bits or fewer: tensors that cannot be negative use the whole range
    fixed_scale: float | None = None  # one scale for every tensor of the network


class ActivationQuantizer(nn.Module):
    """Rounds an activation to the stored integers times a scale.

    Buffers: scale (1,); reach (1,): running mean of the largest magnitude of a batch; share (1,): range / reach.
    """

    scale: Tensor
    reach: Tensor
    share: Tensor

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        for name in ("scale", "reach", "share"):
            self.register_buffer(name, torch.ones(1))

    @property
    def format(self) -> Format:
        """The format of the stored activation."""
        return Format(self.bits, self.signed, (float(self.scale),))

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded."""
        return fake_quantize(x, self.scale, self.bits, self.signed)

    def observe(self, x: Tensor, scales: str) -> None:
        """Let the range follow the values of a training batch."""
        with torch.no_grad():
            self.reach.lerp_(x.detach().abs().max().reshape(1), 1 - MOMENTUM)
            self.scale.fill_(scale_of(float(self.reach * self.share), self.bits, self.signed, scales))

    def extra_repr(self) -> str:
        """Show the width and the scale."""
        return f"bits={self.bits}, signed={self.signed}, scale={float(self.scale):g}"


class QuantizedModel(nn.Module):
    """A float model, the graph of its operators, and a format for every tensor.

    In eval mode the output is exactly that of the deployed integers, as float32 reals (int64 for argmax), unless
    `hard` is set to False: then, and in training, and under torch.export, values are rounded in float (`soft`).
    Made by Quantize, or by `from_spec`; the state dict holds plain tensors.
    """

    quantized = True

    def __init__(self, model: nn.Module, graph: Graph, arithmetic: Arithmetic, weight_bits: Mapping[str, int]) -> None:
        """Wrap `model` (batch norms folded, changed in place) and its `graph`.

        weight_bits: the width of each weight, by tensor name. Raises UnsupportedModel for operators without integers.
        """
        super().__init__()
        refusals = tuple(_refusals(graph, arithmetic.bits))
        if refusals:
            raise UnsupportedModel(refusals)
        self.model = model
        self.arithmetic = arithmetic
        self.weight_bits = dict(weight_bits)
        self.hard = True
        self.training_hard = False  # the last part of training: exact values forward, soft gradients back
        self._exact: dict[str, Exact] = {}
        self._exact_key: tuple[Any, ...] = ()
        self._parametrise(graph)
        self._keep_constants(graph)
        self.graph = _without_constants(graph)
        self.points = nn.ModuleDict(
            {_key(name): self._quantizer(graph, name) for name in graph.quantised_points() if graph[name].dtype == "float32"}
        )
        self._last_use = _last_use(graph)
        self._sites: dict[str, list[str]] = {}
        for node in graph:
            if node.op in WEIGHTED:
                self._sites.setdefault(node.params["weight"], []).append(node.name)
        nn.Module.train(self, False)

    @property
    def rounding(self) -> str:
        """How accumulators are rounded: "half_up", or "floor" (MicroAI)."""
        return self.arithmetic.rounding

    # --- construction ---

    def _parametrise(self, graph: Graph) -> None:
        for name, node in weights_of(graph).items():
            layer, tensor = self._owner(name)
            if self._quantizer_of(name) is None:
                channels = len(node.constants["weight"]) if self.arithmetic.per_channel else 1
                new = WeightQuantizer(self.weight_bits[name], channels)
                parametrize.register_parametrization(layer, tensor, new)

    def _keep_constants(self, graph: Graph) -> None:
        """Keep the constants that no parameter holds."""
        for node in graph:
            for key, value in node.constants.items():
                if key not in node.params or node.op == "batchnorm":
                    self.register_buffer(_constant(node.name, key), torch.from_numpy(np.array(value)))

    def _quantizer(self, graph: Graph, name: str) -> ActivationQuantizer:
        if graph[name].op == "softmax":
            fixed = ActivationQuantizer(integer.SOFTMAX_FORMAT.bits, False)
            fixed.scale.fill_(integer.SOFTMAX_FORMAT.scale[0])
            return fixed
        bits = self.arithmetic.bits
        signed = not (self.arithmetic.unsigned and bits <= 8 and _not_negative(graph, name))
        return ActivationQuantizer(bits, signed)

    # --- reading the tensors ---

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, tensor = name.rpartition(".")
        return self.model.get_submodule(path), tensor

    def _tensor(self, name: str) -> Tensor:
        layer, tensor = self._owner(name)
        value: Tensor = getattr(layer, tensor)
        return value

    def _quantizer_of(self, name: str) -> WeightQuantizer | None:
        layer, tensor = self._owner(name)
        if not parametrize.is_parametrized(layer, tensor):
            return None
        steps = layer.parametrizations[tensor]  # type: ignore[index]
        return next((s for s in steps if isinstance(s, WeightQuantizer)), None)

    def weight_quantizer(self, name: str) -> WeightQuantizer:
        """Return the parametrisation of a weight, by tensor name."""
        found = self._quantizer_of(name)
        assert found is not None
        return found

    def float_weight(self, name: str) -> Tensor:
        """Return the weight before rounding, by tensor name."""
        layer, tensor = self._owner(name)
        steps: Any = layer.parametrizations[tensor]  # type: ignore[index]
        value: Tensor = steps.original
        for step in steps:
            if not isinstance(step, WeightQuantizer):
                value = step(value)
        return value

    def bias(self, node: Node) -> Tensor | None:
        """Return the bias of a node, if it has one."""
        return self._constants(node, ("bias",), {}).get("bias")

    def has_point(self, name: str) -> bool:
        """Whether the output of a node carries a format of its own."""
        return _key(name) in self.points

    def point(self, name: str) -> ActivationQuantizer:
        """Return the quantiser of a quantised point, by node name."""
        found = self.points[_key(name)]
        assert isinstance(found, ActivationQuantizer)
        return found

    def _constants(self, node: Node, keys: tuple[str, ...], seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a node; `seen` saves computing a shared weight twice."""
        found = {}
        for key in keys:
            buffer = _constant(node.name, key)
            name = node.params.get(key)
            if buffer in self._buffers:
                found[key] = self.get_buffer(buffer)
            elif name is not None:
                if name not in seen:
                    seen[name] = self._tensor(name)
                found[key] = seen[name]
        return found

    # --- formats ---

    def formatted(self) -> Graph:
        """Return the graph with the current formats and float constants: what capture(self) gives, without export."""
        nodes = {}
        with torch.no_grad():
            for node in self.graph:
                found = self._constants(node, _CONSTANTS.get(node.op, ()), {})
                arrays = {k: v.detach().cpu().numpy() for k, v in found.items()}
                attrs = dict(node.attrs)
                if node.op in ("conv", "linear", "avgpool"):
                    attrs["rounding"] = self.rounding
                fmt = self.point(node.name).format if self.has_point(node.name) else None
                weight = self.weight_quantizer(node.params["weight"]).format if node.op in WEIGHTED else None
                nodes[node.name] = replace(node, constants=arrays, attrs=attrs, format=fmt, weight_format=weight)
        return self.graph.with_nodes(nodes)

    def update_scales(self) -> None:
        """Derive every weight's scale from the weight as it is now, so that ranges can shrink as well as grow.

        A scale is raised where an accumulator could otherwise leave int32, or a multiplier its range.
        """
        if self.arithmetic.fixed_scale is not None:
            return
        with torch.no_grad():
            for name, nodes in self._sites.items():
                self._update_weight(name, [self.graph[n] for n in nodes])
            for node in self.graph:
                if node.op in ("add", "concat"):
                    largest = max(self._format_of(i).scale[0] for i in node.inputs)
                    self._raise_scale(self._point_of(node.name), largest / SUM_RATIO)

    def _update_weight(self, name: str, nodes: list[Node]) -> None:
        quantizer, weight = self.weight_quantizer(name), self.float_weight(name)
        per_channel = quantizer.axis == 0
        tops = weight_magnitudes(weight, per_channel) * quantizer.ratio
        scale = scales_of(tops, quantizer.bits, True, self.arithmetic.scales).to(weight.device)
        for node in nodes:
            least = self._least_scale(node, weight, scale)
            scale = torch.maximum(scale, least if per_channel else least.max().reshape(1))
        if self.arithmetic.scales == "power_of_two":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        quantizer.scale.copy_(scale)

    def _least_scale(self, node: Node, weight: Tensor, scale: Tensor) -> Tensor:
        """Return for each output channel the weight scale s below which its sums might leave int32: (Co,).

        From |sum| <= sum(|w|/s + 1/2) X + |b|/(s_in s) + s_out/(2 s_in s) < 2^31, X the largest input integer; and
        from the left shift before a multiplication, at most 4 max(s) s_in / s_out, with the same bound.
        """
        source = self._format_of(node.inputs[0])
        largest, rows = max(-source.low, source.high), weight.abs().reshape(len(weight), -1)
        reach = rows.sum(1).double() * largest * source.scale[0]
        bias = self.bias(node)
        if bias is not None:
            reach = reach + bias.detach().abs().double()
        self._raise_scale(self._point_of(node.name), float(reach.max()) * OUT_RATIO)
        out = self._format_of(node.name).scale[0]
        room = (LIMIT - largest * rows.shape[1] / 2 - 16) * (1 - 1e-6)
        sums = (reach + out / 2) / (source.scale[0] * room)
        shifted = 4 * float(scale.max()) * (reach + out / 2) / (out * room)
        return torch.maximum(sums, shifted).float()

    def _raise_scale(self, point: str, least: float) -> None:
        scale = self.point(point).scale
        if float(scale) < least:
            power_of_two = self.arithmetic.scales == "power_of_two"
            scale.fill_(2.0 ** math.ceil(math.log2(least)) if power_of_two else least)

    def _format_of(self, name: str) -> Format:
        """Return the format of the integers that a node gives."""
        return self.point(self._point_of(name)).format

    def _point_of(self, name: str) -> str:
        """Return the quantised point whose format the integers of a node have."""
        while not self.has_point(name):
            name = self.graph.fused_into(name) or self.graph[name].inputs[0]
        return name

    # --- running ---

    def forward(self, x: Tensor) -> Any:
        """Return the output, or a tuple when there are several. x: (n, ...) float32."""
        if torch.compiler.is_exporting():
            return self.soft(x)
        if not self.training:
            return self.exact(x) if self.hard else self.soft(x)
        if not self.training_hard:
            return self.soft(x, observe=True)
        self.update_scales()
        return self.exact_with_gradient(x)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Switch training on or off; leaving it derives the scales once more."""
        leaving = self.training and not mode
        super().train(mode)
        if leaving:
            self.update_scales()
        return self

    def soft(self, x: Tensor, observe: bool = False) -> Any:
        """Return the output with rounding in float and straight-through gradients.

        observe: follow the ranges of weights and activations first (training).
        """
        if observe:
            self.update_scales()
        seen: dict[str, Tensor] = {}

        def step(node: Node, inputs: list[Tensor]) -> Tensor:
            y = x if node.op == "input" else self.float_step(node, inputs, seen)
            if not self.has_point(node.name):
                return y
            point = self.point(node.name)
            if observe and self.arithmetic.fixed_scale is None and node.op != "softmax":
                point.observe(y, self.arithmetic.scales)
            out: Tensor = point(y)
            return out

        return self.walk(step)

    def float_step(
        self, node: Node, inputs: list[Tensor], seen: dict[str, Tensor], rounded: bool = True
    ) -> Tensor:
        """Return what a node computes in float, before its own output is rounded.

        seen: weights that were already computed, by name; rounded: use rounded weights.
        """
        if not rounded and node.op in WEIGHTED:
            seen = {node.params["weight"]: self.float_weight(node.params["weight"])}
        return FLOAT[node.op](node, inputs, self._constants(node, _CONSTANTS.get(node.op, ()), seen))

    def exact(self, x: Tensor) -> Any:
        """Return the output of the deployed integers, as reals; no gradient."""
        if not torch.compiler.is_compiling():
            self.prepare()
        with torch.no_grad():
            return self.walk(lambda node, inputs: self._exact_step(node, inputs, x), self._real)

    def _exact_step(self, node: Node, inputs: list[Tensor], x: Tensor) -> Tensor:
        if node.op == "input":
            point = self.point(node.name)
            return integers(x, point.scale, point.bits, point.signed)
        return run_exact(node, inputs, self._exact[node.name])

    def _real(self, node: Node, value: Tensor) -> Tensor:
        return value if node.op == "argmax" else value * self.point(self._point_of(node.name)).scale

    def exact_with_gradient(self, x: Tensor) -> Any:
        """Return the exact output, with the gradients of the soft one."""
        self.prepare()
        seen: dict[str, Tensor] = {}

        def step(node: Node, pairs: list[Any]) -> Any:
            with torch.no_grad():
                q = self._exact_step(node, [pair[1] for pair in pairs], x)
            y = x if node.op == "input" else self.float_step(node, [pair[0] for pair in pairs], seen)
            if node.op == "argmax" or self.graph.fused_into(node.name):
                return y, q
            y = self.point(node.name)(y) if self.has_point(node.name) else y
            return y + (self._real(node, q) - y).detach(), q

        return self.walk(step, lambda node, pair: pair[0])

    def walk(self, step: Callable[[Node, list[Any]], Any], result: Callable[[Node, Any], Any] | None = None) -> Any:
        """Run the nodes in order and return the outputs; values are dropped after their last use."""
        values: dict[str, Any] = {}
        for node in self.graph.nodes:
            values[node.name] = step(node, [values[i] for i in node.inputs])
            for name in self._last_use[node.name]:
                del values[name]
        out = [values[n] if result is None else result(self.graph[n], values[n]) for n in self.graph.outputs]
        return out[0] if len(out) == 1 else tuple(out)

    def prepare(self) -> None:
        """Compute the integer constants anew if a tensor changed since; `exact` does so by itself."""
        tensors = [*self.parameters(), *self.buffers()]
        key = tuple((t.data_ptr(), t._version) for t in tensors)
        if key == self._exact_key:
            return
        graph, device = self.formatted(), tensors[0].device
        self._exact = {n.name: exact_constants(graph, n, device) for n in graph if n.op != "input"}
        self._exact_key = key

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the tensors, then derive the integer constants (see nn.Module.load_state_dict)."""
        result = super().load_state_dict(*args, **kwargs)
        self.prepare()
        return result

    # --- rebuilding ---

    def spec(self) -> dict[str, Any]:
        """Return what rebuilds the structure around a float model, as JSON; the tensors are in the state dict."""
        source = self.graph[self.graph.inputs[0]]
        return {
            "example_shape": [1, *source.shape],
            "arithmetic": asdict(self.arithmetic),
            "weight_bits": self.weight_bits,
            "points": {n: {"bits": p.bits, "signed": p.signed} for n, p in self._named_points()},
        }

    def _named_points(self) -> Iterator[tuple[str, ActivationQuantizer]]:
        for node in self.graph:
            if self.has_point(node.name):
                yield node.name, self.point(node.name)

    @classmethod
    def from_spec(cls, model: nn.Module, spec: Mapping[str, Any]) -> QuantizedModel:
        """Rebuild from `spec()` around a copy of `model`, whose tensors need the right shapes but no right values.

        Batch norms may still be there, and weights may carry WeightQuantizer already. Load the state dict next.
        Raises StoreError when the model's operators are not those of the spec.
        """
        example = torch.zeros(tuple(spec["example_shape"]))
        model = fold_batch_norms(copy.deepcopy(model).eval(), example)
        graph = _float_graph(model, example)
        made = cls(model, graph, Arithmetic(**spec["arithmetic"]), spec["weight_bits"])
        points = {n: {"bits": p.bits, "signed": p.signed} for n, p in made._named_points()}
        if points != spec["points"]:
            differ = sorted(set(points) ^ set(spec["points"])) or "their formats"
            raise StoreError(f"the saved model was quantised around other operators (differ: {differ}); give the same class")
        return made


_CONSTANTS = {"conv": ("weight", "bias"), "linear": ("weight", "bias"), "batchnorm": ("scale", "shift")}


def weights_of(graph: Graph) -> dict[str, Node]:
    """Return each weight's name and the first node that uses it."""
    found: dict[str, Node] = {}
    for node in graph:
        if node.op in WEIGHTED:
            found.setdefault(node.params["weight"], node)
    return found


def _key(name: str) -> str:
    """Return the key of a node in a ModuleDict, whose own attributes must not be hidden."""
    return f"at_{name}"


def _constant(node: str, key: str) -> str:
    return f"constant_{node}_{key}"


def _without_constants(graph: Graph) -> Graph:
    nodes = {n.name: replace(n, constants={}, format=None, weight_format=None) for n in graph}
    return graph.with_nodes(nodes)


def _last_use(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Return for each node the values that nothing reads after it."""
    last = {name: name for name in (n.name for n in graph)}
    for node in graph:
        last.update(dict.fromkeys(node.inputs, node.name))
    found: dict[str, tuple[str, ...]] = {n.name: () for n in graph}
    for name, at in last.items():
        if name not in graph.outputs:
            found[at] += (name,)
    return found


def _not_negative(graph: Graph, name: str) -> bool:
    """Whether the values of a node are never below zero, whatever the input."""
    node = graph[name]
    if node.op in _NOT_NEGATIVE:
        return True
    return node.op in _PASSES_SIGN and all(_not_negative(graph, i) for i in node.inputs)


def _refusals(graph: Graph, bits: int) -> Iterator[str]:
    for node in graph:
        where = f"{node.module or 'the model'} ({node.name})"
        if node.op != "input" and node.op not in FLOAT:
            yield f"{where}: {node.op} has no integer form; {close_to(node.op, FLOAT)}"
        elif node.op in WEIGHTED and "weight" not in node.params:
            yield f"{where}: the weight of this {node.op} is no parameter of the model; make it an nn.Parameter"
        elif node.op in ("hardswish", "softmax") and bits > 8:
            yield f"{where}: {node.op} works on 8 bits or fewer, not on {bits}; use ReLU, or leave softmax out"


def _float_graph(model: nn.Module, example: Tensor) -> Graph:
    """Capture a model, seeing through the weight quantisers that it may carry."""
    graph = capture(model, example)
    return graph.with_nodes({n.name: replace(n, format=None, weight_format=None) for n in graph})
