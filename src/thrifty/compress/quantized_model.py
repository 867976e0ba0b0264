"""A model that computes in the integers of its deployed program, and that trains in their float shadow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty.arith import Format
from thrifty.capture import capture
from thrifty.compress.execute import FLOAT, Exact, exact_constants, run_exact
from thrifty.compress.fake_quantize import WeightQuantizer, integers
from thrifty.compress.fold import fold_batch_norms
from thrifty.compress.places import nodes_at
from thrifty.compress.points import (
    CONSTANTS,
    WEIGHTED,
    ActivationQuantizer,
    Arithmetic,
    last_uses,
    new_quantizer,
    weights_of,
    without_constants,
)
from thrifty.compress.refuse import copied, refusals, where
from thrifty.compress.scales import update_scales
from thrifty.errors import DataError, KnobError, StoreError, UnsupportedModel
from thrifty.graph import Graph, Node


class QuantizedModel(nn.Module):
    """A float model, the graph of its operators, and a format for every tensor.

    In eval mode the output is exactly that of the deployed integers, as float32 reals (int64 for argmax),
    unless `hard` is set to False: then, and in training, and under torch.export, values are rounded in
    float (`soft`). Made by Quantize, or by `from_spec`; the state dict holds plain tensors.

    The graph is run, not the modules: forward hooks on the modules of `model` see nothing; `watching` shows what
    passes them. torch.compile takes it in eval mode; training needs the ranges as Python numbers.
    """

    quantized = True

    def __init__(self, model: nn.Module, graph: Graph, arithmetic: Arithmetic, weight_bits: Mapping[str, int]) -> None:
        """Wrap `model` (batch norms folded; changed in place) and its `graph`, with constants.

        weight_bits: the width of each weight, by tensor name.
        Raises UnsupportedModel that lists every operator without an integer form.
        """
        super().__init__()
        refused = tuple(refusals(graph, arithmetic.bits))
        if refused:
            raise UnsupportedModel(refused)
        self.model = model
        self.arithmetic = arithmetic
        self.weight_bits = dict(weight_bits)
        self.hard = True
        self.training_hard = False  # the last part of training: exact values forward, soft gradients back
        self.graph = without_constants(graph)
        self.sites = weights_of(self.graph)
        self._last_uses = last_uses(graph)
        self._exact: dict[str, Exact] = {}
        self._exact_key: tuple[Any, ...] = ()
        self._nodes_at: dict[str, str] = {}  # place -> node, as far as they were asked for
        self._watched: dict[str, Any] | None = None  # node -> value, while somebody watches
        self._parametrise(graph)
        self._keep_constants(graph)
        names = [n for n in graph.quantised_points() if graph[n].dtype == "float32"]
        self.points = nn.ModuleDict({_key(n): new_quantizer(graph, n, arithmetic) for n in names})
        nn.Module.train(self, False)

    @property
    def rounding(self) -> str:
        """How accumulators are rounded: "half_up", or "floor" (MicroAI)."""
        return self.arithmetic.rounding

    # --- construction ---

    def _parametrise(self, graph: Graph) -> None:
        for name, nodes in self.sites.items():
            layer, tensor = self._owner(name)
            if self._quantizer_of(name) is None:
                channels = graph[nodes[0].name].constants["weight"].shape[0]
                new = WeightQuantizer(self.weight_bits[name], channels if self.arithmetic.per_channel else 1)
                parametrize.register_parametrization(layer, tensor, new)

    def _keep_constants(self, graph: Graph) -> None:
        """Keep the constants that no parameter holds."""
        for node in graph:
            for key, value in node.constants.items():
                if key not in node.params or node.op == "batchnorm":
                    self.register_buffer(_constant(node.name, key), torch.from_numpy(np.array(value)))

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
        if steps.is_tensor:
            values: tuple[Tensor, ...] = (steps.original,)
        else:
            values = tuple(getattr(steps, f"original{i}") for i in range(steps.ntensors))
        for step in steps:
            if not isinstance(step, WeightQuantizer):
                values = (step(*values),)
        return values[0]

    def bias(self, node: Node) -> Tensor | None:
        """Return the bias of a node, if it has one."""
        return self._constants(node, ("bias",), {}).get("bias")

    def has_point(self, name: str) -> bool:
        """Whether the output of a node carries a format of its own."""
        return _key(name) in self.points

    def constants_of(self, node: Node) -> tuple[Tensor, ...]:
        """Return the tensors of a node: weight, and bias if it has one; scale and shift of a batch norm."""
        found = self._constants(node, CONSTANTS.get(node.op, ()), {})
        return tuple(t.detach() for t in found.values())

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
        """Return what capture(self) gives, without an export: current formats and float constants."""
        nodes = {}
        with torch.no_grad():
            for node in self.graph:
                found = self._constants(node, CONSTANTS.get(node.op, ()), {})
                arrays = {k: v.detach().cpu().numpy() for k, v in found.items()}
                attrs = dict(node.attrs)
                if node.op in ("conv", "linear", "avgpool"):
                    attrs["rounding"] = self.rounding
                fmt = self.point(node.name).format if self.has_point(node.name) else None
                weight = self.weight_quantizer(node.params["weight"]).format if node.op in WEIGHTED else None
                nodes[node.name] = replace(node, constants=arrays, attrs=attrs, format=fmt, weight_format=weight)
        return self.graph.with_nodes(nodes)

    def format_of(self, name: str) -> Format:
        """Return the format of the integers that a node gives."""
        return self.point(self.point_of(name)).format

    def point_of(self, name: str) -> str:
        """Return the quantised point whose format the integers of a node have."""
        while not self.has_point(name):
            name = self.graph.fused_into(name) or self.graph[name].inputs[0]
        return name

    def layer_of(self, name: str) -> Node:
        """Return the node that computes the values of a point: of a fused activation, the one before it."""
        node = self.graph[name]
        fused = bool(node.inputs) and self.graph.fused_into(node.inputs[0]) == name
        return self.graph[node.inputs[0]] if fused else node

    # --- running ---

    def forward(self, x: Tensor) -> Any:
        """Return the output, or a tuple when there are several. x: (n, ...) float32."""
        if torch.compiler.is_exporting():
            return self.soft(x)
        if not self.training:
            return self.exact(x) if self.hard else self.soft(x)
        update_scales(self)
        return self.exact_with_gradient(x) if self.training_hard else self.soft(x)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Switch training on or off; leaving it derives the scales once more. Integer constants are made anew."""
        leaving = self.training and not mode
        super().train(mode)
        self._exact_key = ()
        if leaving:
            update_scales(self)
        return self

    def soft(self, x: Tensor) -> Any:
        """Return the output with rounding in float and straight-through gradients."""
        seen: dict[str, Tensor] = {}

        def step(node: Node, inputs: list[Tensor]) -> Any:
            y = x if node.op == "input" else self.float_step(node, inputs, seen)
            return self.point(node.name)(y) if self.has_point(node.name) else y

        return self.walk(step)

    def float_step(self, node: Node, inputs: list[Tensor], seen: dict[str, Tensor], rounded: bool = True) -> Tensor:
        """Return what a node computes in float, before its own output is rounded.

        seen: weights that were already computed, by name; rounded: use rounded weights.
        """
        if not rounded and node.op in WEIGHTED:
            seen = {node.params["weight"]: self.float_weight(node.params["weight"])}
        return FLOAT[node.op](node, inputs, self._constants(node, CONSTANTS.get(node.op, ()), seen))

    def exact(self, x: Tensor) -> Any:
        """Return the output of the deployed integers, as reals; no gradient. Raises DataError for NaN in x."""
        if not torch.compiler.is_compiling():
            _refuse_nan(x)
            self.prepare()
        with torch.no_grad():
            return self.walk(lambda node, inputs: self._exact_step(node, inputs, x), self._real)

    def _exact_step(self, node: Node, inputs: list[Tensor], x: Tensor) -> Tensor:
        if node.op == "input":
            point = self.point(node.name)
            return integers(x, point.scale, point.bits, point.signed)
        return run_exact(node, inputs, self._exact[node.name])

    def _real(self, node: Node, value: Tensor) -> Tensor:
        return value if node.op == "argmax" else value * self.point(self.point_of(node.name)).scale

    def exact_with_gradient(self, x: Tensor) -> Any:
        """Return the exact output, with the gradients of the soft one. Raises DataError for NaN in x."""
        _refuse_nan(x)
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
            if self._watched is not None and node.name in self._watched:
                self._watched[node.name] = values[node.name] if result is None else result(node, values[node.name])
            for name in self._last_uses[node.name]:
                del values[name]
        out = [values[n] if result is None else result(self.graph[n], values[n]) for n in self.graph.outputs]
        return out[0] if len(out) == 1 else tuple(out)

    @contextmanager
    def watching(self, places: Sequence[str], x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Give a mapping that the passes within fill with what they show at places of `model`, by place.

        Values are those of the pass: rounded where the graph rounds, with its gradients; in exact passes, a layer
        into which an activation is fused shows what that gives. x: (n, ...), inputs that tell the operators apart
        (see compress.places). Raises Incompatible for a place that no operator gives.
        """
        new = [place for place in places if place not in self._nodes_at]
        self._nodes_at |= nodes_at(self, new, x) if new else {}
        nodes = {place: self._nodes_at[place] for place in places}
        self._watched, before = dict.fromkeys(nodes.values()), self._watched
        shown: dict[str, Tensor] = {}
        try:
            yield shown
            shown.update({place: self._watched[name] for place, name in nodes.items()})
        finally:
            self._watched = before

    def prepare(self) -> None:
        """Compute the integer constants anew if a tensor changed since; `exact` does so by itself."""
        tensors = [*self.parameters(), *self.buffers()]
        key = tuple((t.data_ptr(), t._version) for t in tensors)
        if key == self._exact_key:
            return
        graph, device = self.formatted(), tensors[0].device
        self._exact, bad = {}, []
        for node in graph:
            try:
                self._exact[node.name] = exact_constants(graph, node, device)
            except KnobError as err:
                bad.append(f"{where(node)}: {err}")
        if bad:
            raise KnobError("the integers do not fit: " + "; ".join(bad) + self._advice())
        self._exact_key = key

    def _advice(self) -> str:
        if self.arithmetic.fixed_scale is None:
            return ""
        return (
            f" (every scale is {self.arithmetic.fixed_scale:g} here: lower fraction_bits of Quantize, or give each "
            "layer a scale of its own with granularity='layer')"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the tensors, then derive the integer constants (see nn.Module.load_state_dict)."""
        result = super().load_state_dict(*args, **kwargs)
        self.prepare()
        return result

    # --- rebuilding ---

    def spec(self) -> dict[str, Any]:
        """Return, as JSON, what rebuilds the structure around a float model; it holds no tensors."""
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
        """Rebuild from `spec()` around a copy of `model`, whose tensors need the right shapes but no right
        values.

        Batch norms may still be there, and weights may carry WeightQuantizer already. Load the state dict
        next. Raises StoreError when the model's operators are not those of the spec.
        """
        example = torch.zeros(tuple(spec["example_shape"]))
        model = fold_batch_norms(copied(model).eval(), example)
        graph = capture(model, example)
        strange = set(weights_of(graph)) ^ set(spec["weight_bits"])
        if strange:
            names = ", ".join(sorted(strange))
            raise StoreError(f"the saved model was quantised around other operators ({names}); give the same class")
        made = cls(model, graph, Arithmetic(**spec["arithmetic"]), spec["weight_bits"])
        points = {n: {"bits": p.bits, "signed": p.signed} for n, p in made._named_points()}
        if points != spec["points"]:
            differ = sorted(set(points) ^ set(spec["points"])) or "their formats"
            raise StoreError(f"the saved model was quantised around other operators ({differ}); give the same class")
        return made


def _refuse_nan(x: Tensor) -> None:
    if bad := int(x.isnan().sum()):
        raise DataError(f"the input has {bad} NaN values; a quantised model takes numbers")


def _key(name: str) -> str:
    """Return the key of a node in a ModuleDict, whose own attributes must not be hidden."""
    return f"at_{name}"


def _constant(node: str, key: str) -> str:
    return f"constant_{node}_{key}"
