"""Random networks as plain graphs, with formats: food for program == C == Cortex-M. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from thrifty import integer
from thrifty.arith import Format
from thrifty.graph import ACTIVATIONS, Graph, Node

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 12, 16)


@dataclass
class Sketch:
    """A graph under construction, with a guess of each node's spread so that formats neither clip nor vanish."""

    draw: st.DrawFn
    rng: np.random.Generator
    bits: int = 8
    weight_bits: int = 8
    per_channel: bool = True
    power_of_two: bool = False
    rounding: str = "half_up"
    nodes: list[Node] = field(default_factory=list)
    spread: dict[str, float] = field(default_factory=dict)

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def add(self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], spread: float, **rest) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, shape=shape, module=name.replace("_", "."), **rest))
        self.spread[name] = max(spread, 1e-3)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return next(n.shape for n in self.nodes if n.name == name)

    def scale(self, magnitude: float, bits: int, signed: bool) -> float:
        exact = magnitude / ((1 << (bits - signed)) - 1)
        return 2.0 ** math.ceil(math.log2(exact)) if self.power_of_two else float(np.float32(exact))


def weighted(sketch: Sketch, op: str, x: str, shape: tuple[int, ...], weight_shape: tuple[int, ...], **attrs) -> str:
    fan = math.prod(weight_shape[1:])
    weight = sketch.rng.normal(0, 1 / math.sqrt(fan), weight_shape).astype(np.float32)
    constants = {"weight": weight}
    if sketch.draw(st.booleans()):
        constants["bias"] = sketch.rng.normal(0, 0.3 * sketch.spread[x], weight_shape[0]).astype(np.float32)
    return sketch.add(
        op, (x,), shape, sketch.spread[x] * 1.05, constants=constants,
        attrs={**attrs, "rounding": sketch.rounding},
    )  # fmt: skip


def out_size(size: int, kernel: int, stride: int, pad: tuple[int, int]) -> int:
    return (size + pad[0] + pad[1] - kernel) // stride + 1


def conv(sketch: Sketch, x: str) -> str:
    channels, *space = sketch.shape(x)
    kind = sketch.pick("dense", "dense", "depthwise", "grouped", "pointwise")
    groups = {"depthwise": channels, "grouped": max(g for g in (1, 2, 3, 4) if channels % g == 0)}.get(kind, 1)
    out = channels if kind == "depthwise" else groups * sketch.pick(1, 2, 3, 4, 5, 8)
    kernel = tuple(1 if kind == "pointwise" else sketch.pick(1, 2, 3, 5) for _ in space)
    stride = tuple(sketch.pick(1, 1, 2, 3) for _ in space)
    padding = tuple((sketch.pick(*range(k)), sketch.pick(*range(k))) for k in kernel)
    kernel = tuple(min(k, s + sum(p)) for k, s, p in zip(kernel, space, padding))
    padding = tuple((min(a, k - 1), min(b, k - 1)) for (a, b), k in zip(padding, kernel))
    kernel = tuple(min(k, s + sum(p)) for k, s, p in zip(kernel, space, padding))
    size = tuple(out_size(s, k, t, p) for s, k, t, p in zip(space, kernel, stride, padding))
    return weighted(
        sketch, "conv", x, (out, *size), (out, channels // groups, *kernel),
        stride=stride, padding=padding, dilation=(1,) * len(space), groups=groups,
    )  # fmt: skip


def linear(sketch: Sketch, x: str) -> str:
    (features,) = sketch.shape(x)
    out = sketch.pick(1, 2, 3, 4, 5, 8, 11)
    return weighted(sketch, "linear", x, (out,), (out, features))


def pool(sketch: Sketch, x: str) -> str:
    channels, *space = sketch.shape(x)
    op = sketch.pick("maxpool", "avgpool")
    whole = sketch.pick(True, False)
    kernel = tuple(space) if whole else tuple(min(s, sketch.pick(1, 2, 3)) for s in space)
    stride = kernel if whole else tuple(sketch.pick(1, 2, 3) for _ in space)
    pads = [(0, 0) if whole or op == "avgpool" else (sketch.pick(*range(k // 2 + 1)),) * 2 for k in kernel]
    size = tuple(out_size(s, k, t, p) for s, k, t, p in zip(space, kernel, stride, pads))
    attrs = {"kernel": kernel, "stride": stride, "padding": tuple(pads), "ceil": False}
    if op == "avgpool":
        attrs |= {"count_include_pad": True, "rounding": sketch.rounding}
    narrower = 1.0 if op == "maxpool" else 1 / math.sqrt(math.prod(kernel))
    return sketch.add(op, (x,), (channels, *size), sketch.spread[x] * max(narrower, 0.2), attrs=attrs)


def activation(sketch: Sketch, x: str) -> str:
    op = sketch.pick("relu", "relu6", "relu") if sketch.bits == 16 else sketch.pick("relu", "relu6", "hardswish")
    return sketch.add(op, (x,), sketch.shape(x), sketch.spread[x] * 0.8)


def add(sketch: Sketch, x: str) -> str | None:
    others = [n.name for n in sketch.nodes if n.name != x and n.shape == sketch.shape(x)]
    if not others:
        return None
    other = sketch.pick(*others)
    pair = sketch.pick((x, other), (other, x))
    return sketch.add("add", pair, sketch.shape(x), math.hypot(sketch.spread[x], sketch.spread[other]))


def concat(sketch: Sketch, x: str) -> str | None:
    shape = sketch.shape(x)
    others = [n.name for n in sketch.nodes if len(n.shape) == len(shape) and n.shape[1:] == shape[1:]]
    names = (x, *(sketch.pick(*others) for _ in range(sketch.pick(1, 1, 2))))
    channels = sum(sketch.shape(n)[0] for n in names)
    spread = max(sketch.spread[n] for n in names)
    return sketch.add("concat", names, (channels, *shape[1:]), spread, attrs={"axis": 0})


def permute(sketch: Sketch, x: str) -> str:
    shape = sketch.shape(x)
    axes = tuple(sketch.draw(st.permutations(range(len(shape)))))
    return sketch.add("permute", (x,), tuple(shape[a] for a in axes), sketch.spread[x], attrs={"axes": axes})


def batchnorm(sketch: Sketch, x: str) -> str:
    channels = sketch.shape(x)[0]
    constants = {
        "scale": sketch.rng.uniform(-1.5, 1.5, channels).astype(np.float32),
        "shift": sketch.rng.normal(0, 0.3 * sketch.spread[x], channels).astype(np.float32),
    }
    return sketch.add("batchnorm", (x,), sketch.shape(x), sketch.spread[x], constants=constants)


def flatten(sketch: Sketch, x: str) -> str:
    return sketch.add("flatten", (x,), (math.prod(sketch.shape(x)),), sketch.spread[x])


SPATIAL = (conv, conv, conv, pool, activation, activation, add, concat, permute)
VECTOR = (linear, linear, activation, add)


def with_formats(sketch: Sketch, graph: Graph) -> Graph:
    """Give every quantised point a format that fits its spread, at a random tightness, and every weight one."""
    points = set(graph.quantised_points())
    for node in graph:
        if node.op in ("conv", "linear"):
            graph = with_weight_format(sketch, graph, node.name)
        elif node.name in points and node.format is None:
            graph = with_format(sketch, graph, node.name, 0.0)
    return graph


def with_format(sketch: Sketch, graph: Graph, name: str, least: float) -> Graph:
    """Return the graph with a format at a quantised point, its scale at least `least`."""
    node = graph[name]
    if node.op == "softmax":
        return graph.with_nodes({name: replace(node, format=integer.SOFTMAX_FORMAT)})
    signed = sketch.bits == 16 or node.op not in ACTIVATIONS or sketch.pick(True, False)
    scale = sketch.scale(sketch.spread[name] * sketch.pick(0.7, 2.0, 3.5), sketch.bits, signed)
    while scale < least:
        scale *= 2
    return graph.with_nodes({name: replace(node, format=Format(sketch.bits, signed, (scale,)))})


def with_weight_format(sketch: Sketch, graph: Graph, name: str) -> Graph:
    """Return the graph with formats for a layer's output and for its weights, so that the sums provably fit."""
    node, source = graph[name], graph[name].inputs[0]
    scale = integer.output_format(graph, source).scale[0]
    inputs = (scale, *integer.output_limits(graph, source))
    weight, bias = node.constants["weight"], node.constants.get("bias")
    point = graph.fused_into(name) or name
    graph = with_format(sketch, graph, point, integer.least_out_scale(weight, bias, inputs))
    fmt = integer.weight_format(
        weight, bias, sketch.weight_bits, inputs, graph[point].format.scale[0],
        per_channel=sketch.per_channel, power_of_two=sketch.power_of_two, rounding=sketch.rounding,
    )  # fmt: skip
    return graph.with_nodes({name: replace(graph[name], weight_format=fmt)})


def new_sketch(draw: st.DrawFn, **fixed) -> Sketch:
    bits = draw(st.sampled_from((8, 8, 16)))
    power_of_two = draw(st.booleans())
    options = {
        "bits": bits,
        "weight_bits": 16 if bits == 16 else draw(st.sampled_from((4, 8, 8))),
        "per_channel": draw(st.booleans()),
        "power_of_two": power_of_two,
        "rounding": draw(st.sampled_from(("half_up", "half_up", "floor"))) if power_of_two else "half_up",
    }
    return Sketch(draw, np.random.default_rng(draw(st.integers(0, 2**32 - 1))), **{**options, **fixed})


@st.composite
def quantised_graphs(draw: st.DrawFn, layers: int = 6, **fixed) -> Graph:
    """Networks of a few layers, 1-D or 2-D, with a spatial or a class-score output."""
    sketch = new_sketch(draw, **fixed)
    space = tuple(draw(st.integers(1, 9)) for _ in range(draw(st.sampled_from((1, 2, 2)))))
    x = sketch.add("input", (), (draw(st.sampled_from(CHANNELS)), *space), 1.0)
    for _ in range(draw(st.integers(1, layers))):
        x = draw(st.sampled_from(SPATIAL))(sketch, x) or x
    if draw(st.booleans()):
        x = flatten(sketch, x)
        for _ in range(draw(st.integers(1, 2))):
            x = draw(st.sampled_from(VECTOR))(sketch, x) or x
        x = linear(sketch, x)
        if sketch.bits == 8 and draw(st.sampled_from((False, False, True))):
            x = sketch.add("softmax", (x,), sketch.shape(x), 1.0, attrs={"axis": 0})
    return with_formats(sketch, without_dead_ends(Graph(tuple(sketch.nodes), (x,))))


def without_dead_ends(graph: Graph) -> Graph:
    """Drop what the output does not read, as capture would."""
    alive = set(graph.outputs) | set(graph.inputs)
    for node in reversed(graph.nodes):
        if node.name in alive:
            alive |= set(node.inputs)
    return Graph(tuple(n for n in graph.nodes if n.name in alive), graph.outputs)


def example_inputs(program, n: int, seed: int) -> np.ndarray:
    """Return integers (n, H, W, C) over the whole range of the input's type, with the extremes among them."""
    buffer = program.buffers[program.input]
    rng = np.random.default_rng(seed)
    if buffer.dtype == "float32":
        return rng.normal(0, 1, (n, *buffer.shape)).astype(np.float32)
    info = np.iinfo(buffer.dtype)
    x = rng.integers(info.min, info.max + 1, (n, *buffer.shape))
    x[0], x[-1] = info.min, info.max
    return x.astype(buffer.dtype)
