"""Small random graphs, for the tests that run every operator in every form against its other forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from thrifty import integer
from thrifty.arith import Format
from thrifty.graph import FUSABLE, Array, Graph, Node

WIDTHS = {"int8": (8, 8, 8, 6, 4), "int16": (16, 16, 12)}


class Example:
    """A graph under construction. Methods append a node and return its name; integer kinds get formats.

    Scales, bit widths, rounding, signs and shapes are drawn from `rng`; real values stay around one, so that
    most outputs are neither zero nor saturated.
    """

    def __init__(self, rng: np.random.Generator, kind: str) -> None:
        self.rng, self.kind = rng, kind
        self.power = bool(rng.random() < 0.5)
        self.rounding = "floor" if self.power and rng.random() < 0.3 else "half_up"
        self.nodes: dict[str, Node] = {}

    def graph(self, output: str) -> Graph:
        """Return the finished graph."""
        return Graph(tuple(self.nodes.values()), (output,))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a node."""
        return self.nodes[name].shape

    def map_shape(self, channels: int) -> tuple[int, ...]:
        """Return a random (C, H, W), now and then (C, L)."""
        axes = 1 if self.rng.random() < 0.3 else 2
        return (channels, *(int(v) for v in self.rng.integers(1, 10, size=axes)))

    # --- operators ---

    def input(self, shape: tuple[int, ...], signed: bool | None = None) -> str:
        """Append the input."""
        return self._add("input", (), {}, shape, format=self._format(signed))

    def conv(self, x: str, filters: int, groups: int = 1, kernel: int | None = None) -> str:
        """Append a convolution of random kernel, stride and (unequal) padding."""
        space = self.shape(x)[1:]
        sizes = [kernel or int(self.rng.integers(1, 5)) for _ in space]
        window = self._window(space, sizes, still=kernel == 1)
        weight = self._normal(filters, self.shape(x)[0] // groups, *window["kernel"])
        attrs = {"stride": window["stride"], "padding": window["padding"], "groups": groups}
        attrs |= {"dilation": (1,) * len(space), "rounding": self.rounding}
        return self._weighted("conv", x, weight, attrs, (filters, *window["out"]))

    def linear(self, x: str, outputs: int) -> str:
        """Append a linear layer."""
        weight = self._normal(outputs, self.shape(x)[0])
        return self._weighted("linear", x, weight, {"rounding": self.rounding}, (outputs,))

    def batchnorm(self, x: str) -> str:
        """Append a batch norm that does not fold."""
        channels = self.shape(x)[0]
        constants = {"scale": self._normal(channels), "shift": self._normal(channels)}
        return self._add("batchnorm", (x,), {}, self.shape(x), constants, self._format())

    def add(self, a: str, b: str) -> str:
        """Append an addition."""
        return self._add("add", (a, b), {}, self.shape(a), format=self._format())

    def concat(self, parts: Sequence[str], axis: int) -> str:
        """Append a concatenation."""
        shape = list(self.shape(parts[0]))
        shape[axis] = sum(self.shape(p)[axis] for p in parts)
        return self._add("concat", tuple(parts), {"axis": axis}, tuple(shape), format=self._format())

    def changed(self, x: str) -> str:
        """Append x in another format; in float32 a ReLU of it."""
        if self.kind == "float32":
            return self._add("relu", (x,), {}, self.shape(x))
        return self._add("identity", (x,), {}, self.shape(x), format=self._format())

    def unary(self, x: str, op: str, attrs: Mapping[str, Any] | None = None) -> str:
        """Append an element-wise operator."""
        own = self._format() if op == "hardswish" else None
        return self._add(op, (x,), attrs or {}, self.shape(x), format=own)

    def activation(self, x: str) -> str:
        """Append ReLU, ReLU6 or nothing; it takes over the format of the node it fuses into."""
        op = str(self.rng.choice(["relu", "relu6", ""]))
        if not op:
            return x
        node, own = self.nodes[x], None
        if node.op in FUSABLE and node.format is not None:
            own = node.format
            if own.bits <= 8 and self.rng.random() < 0.5:
                own = Format(own.bits, False, own.scale)
            self.nodes[x] = replace(node, format=None)
        return self._add(op, (x,), {}, node.shape, format=own)

    def pool(self, x: str, op: str) -> str:
        """Append a pool of random window: sometimes the whole map, sometimes padded, sometimes with ceil."""
        space = self.shape(x)[1:]
        if self.rng.random() < 0.3:
            none = tuple((0, 0) for _ in space)
            ones = (1,) * len(space)
            window: dict[str, Any] = {"kernel": space, "stride": space, "padding": none, "out": ones}
        else:
            window = self._window(space, [int(self.rng.integers(1, 4)) for _ in space], equal=True)
        attrs: dict[str, Any] = {k: window[k] for k in ("kernel", "stride", "padding")} | {"ceil": False}
        out = tuple(window["out"])
        if op == "avgpool":
            attrs |= {"count_include_pad": True, "rounding": self.rounding}
        elif self.rng.random() < 0.4:
            sizes = zip(space, attrs["kernel"], attrs["stride"], attrs["padding"])
            larger = tuple(_ceil_size(*v) for v in sizes)
            attrs["ceil"], out = larger != out, larger
        own = self._format() if op == "avgpool" else None
        return self._add(op, (x,), attrs, (self.shape(x)[0], *out), format=own)

    def permute(self, x: str) -> str:
        """Append a random order of the axes."""
        shape = self.shape(x)
        axes = tuple(int(a) for a in self.rng.permutation(len(shape)))
        return self._add("permute", (x,), {"axes": axes}, tuple(shape[a] for a in axes))

    def flat(self, x: str) -> str:
        """Append a flatten, unless x is a vector."""
        if len(self.shape(x)) == 1:
            return x
        return self._add("flatten", (x,), {}, (int(np.prod(self.shape(x))),))

    def argmax(self, x: str) -> str:
        """Append an argmax."""
        self.nodes["argmax"] = Node("argmax", "argmax", (x,), {"axis": 0, "keepdim": False}, (), "int64")
        return "argmax"

    # --- parts ---

    def _add(
        self,
        op: str,
        inputs: tuple[str, ...],
        attrs: Mapping[str, Any],
        shape: tuple[int, ...],
        constants: Mapping[str, Array] | None = None,
        format: Format | None = None,
        weight_format: Format | None = None,
    ) -> str:
        name = f"{op}_{len(self.nodes)}"
        module = "" if op == "input" else f"net.{name}"
        self.nodes[name] = Node(
            name, op, inputs, dict(attrs), tuple(shape), module=module, constants=dict(constants or {}),
            format=format, weight_format=weight_format,
        )  # fmt: skip
        return name

    def _weighted(self, op: str, x: str, weight: Array, attrs: Mapping[str, Any], shape: tuple[int, ...]) -> str:
        constants = {"weight": weight}
        if self.rng.random() < 0.8:
            constants["bias"] = self._normal(len(weight))
        fmt, weight_format = self._format(), None
        if fmt is not None:
            graph = self.graph(x)
            source = integer.output_format(graph, x)
            assert source is not None
            bits = 16 if self.kind == "int16" and self.rng.random() < 0.5 else int(self.rng.integers(2, 9))
            inputs = (source.scale[0], *integer.output_limits(graph, x))
            weight_format = integer.weight_format(
                weight, constants.get("bias"), bits, inputs, fmt.scale[0],
                per_channel=bool(self.rng.random() < 0.7), power_of_two=self.power, rounding=self.rounding,
            )  # fmt: skip
            units = source.scale[0] * np.asarray(weight_format.scale)
            if "bias" in constants and units.max() > fmt.scale[0] / 4:  # rounding it would show
                constants["bias"] = np.asarray(np.rint(constants["bias"] / units) * units, dtype=np.float32)
        return self._add(op, (x,), attrs, shape, constants, fmt, weight_format)

    def _normal(self, *shape: int) -> Array:
        fan_in = max(1, int(np.prod(shape[1:])))
        return np.asarray(self.rng.standard_normal(shape) * fan_in**-0.5, dtype=np.float32)

    def _format(self, signed: bool | None = None) -> Format | None:
        """Return a random activation format for values of a few units; None for float32."""
        if self.kind == "float32":
            return None
        bits = int(self.rng.choice(WIDTHS[self.kind]))
        if signed is None:
            signed = bits > 8 or bool(self.rng.random() < 0.7)
        largest = 2.0 ** int(self.rng.choice([2, 2, 2, 1, 3, -6]))  # now and then nearly all saturate
        scale = largest / 2 ** (bits - 1 if signed else bits)
        if not self.power:
            scale *= float(self.rng.uniform(0.6, 1.4))
        return Format(bits, signed, (float(np.float32(scale)),))

    def _window(
        self, space: tuple[int, ...], sizes: Sequence[int], still: bool = False, equal: bool = False
    ) -> dict[str, Any]:
        """Return kernel, stride, padding, output size; still: stride 1, no padding; equal: as pools pad."""
        found: dict[str, list[Any]] = {"kernel": [], "stride": [], "padding": [], "out": []}
        for size, k in zip(space, sizes):
            k = min(k, size) if still or equal else k
            before = 0 if still else int(self.rng.integers(0, k // 2 + 1))
            after = before if equal or still else int(self.rng.integers(0, k // 2 + 1))
            after += max(0, k - size - before - after)  # at least one window
            step = 1 if still else int(self.rng.integers(1, 4))
            steps = (size + before + after - k) // step + 1
            for key, value in zip(found, (k, step, (before, after), steps)):
                found[key].append(value)
        return {key: tuple(values) for key, values in found.items()}


def _ceil_size(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> int:
    """Return the number of windows when the last may hang over but starts in the map or its left padding."""
    before, after = padding
    count = -(-(size + before + after - kernel) // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count
