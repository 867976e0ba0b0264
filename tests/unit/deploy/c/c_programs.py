"""Hand-written programs: every small kernel, several element types, nothing that lowering had a hand in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from thrifty.deploy.program import Buffer, Call, Program

RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "float32": (-math.inf, math.inf)}
KINDS = ("int8", "int4", "int16", "shift", "float32")


@dataclass
class Sketch:
    """A program under construction."""

    kind: str
    rng: np.random.Generator
    buffers: dict[str, Buffer] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def buffer(self, name: str, shape: tuple[int, int, int], dtype: str) -> str:
        self.buffers[name] = Buffer(name, shape, dtype, 0.25, name.replace("_", "."))
        return name

    def call(self, op: str, name: str, inputs: tuple[str, ...], shape, dtype, attrs, constants=None) -> str:
        low, high = RANGES.get(dtype, (0, 0))
        output = self.buffer(f"{name}_out", shape, dtype)
        attrs = {"low": low, "high": high, **attrs}
        self.calls.append(Call(op, name, inputs, output, attrs, constants or {}, module=name.replace("_", ".")))
        return output

    def weighted(self, op: str, name: str, x: str, shape, weight_shape, filters, dtype, **attrs) -> str:
        fan = math.prod(weight_shape) // filters
        if self.kind == "float32":
            weight = self.rng.normal(0, 1 / math.sqrt(fan), weight_shape).astype(np.float32)
            constants = {"weight": weight, "bias": self.rng.normal(0, 1, filters).astype(np.float32)}
            return self.call(op, name, (x,), shape, dtype, {"weight_bits": 32, **FLOAT, **attrs}, constants)
        bits = 4 if self.kind == "int4" else 8
        weight = self.rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), weight_shape)
        constants = {
            "weight": weight.astype(np.int16 if self.kind == "int16" else np.int8),
            "bias": self.rng.integers(-1000, 1000, filters).astype(np.int32),
        }
        if self.kind == "int16":
            bits = 16
        gain = 1 / (2 ** (min(bits, 8) - 2) * math.sqrt(fan))
        requant, more = self.requant(gain, filters)
        return self.call(op, name, (x,), shape, dtype, {"weight_bits": bits, **requant, **attrs}, constants | more)

    def requant(self, gain: float, channels: int):
        if self.kind == "float32":
            return FLOAT, {}
        if self.kind == "shift":
            return {"requant": "shift", "pre_shift": 0, "shift": (round(-math.log2(gain)),), "rounding": "half_up"}, {}
        multiplier = np.floor(gain * self.rng.uniform(0.5, 1, channels) * 2**32).clip(1, 2**31 - 1).astype(np.int32)
        return {"requant": "multiplier", "pre_shift": 0, "shift": (0,), "rounding": "half_up"}, {
            "multiplier": multiplier
        }

    def scaled(self, count: int):
        if self.kind == "float32":
            return {"multipliers": (1,) * count, "shift": 0}
        return {"multipliers": tuple(int(m) for m in self.rng.integers(4000, 12000, count)), "shift": 13}

    def program(self, name: str, output: str) -> Program:
        classes = self.buffers[output].size if self.buffers[output].shape[:2] == (1, 1) else 0
        return Program(name, self.buffers, tuple(self.calls), "image", output, classes)


FLOAT = {"requant": "float", "pre_shift": 0, "shift": (0,), "rounding": "half_up"}


def network(kind: str, name: str = "net") -> Program:
    """Return a small residual network with nearly every operator; kind: one of KINDS."""
    s = Sketch(kind, np.random.default_rng(7))
    wide = {"int16": "int16", "float32": "float32"}.get(kind, "int8")
    positive = {"int16": "int16", "float32": "float32"}.get(kind, "uint8")
    s.buffer("image", (8, 8, 3), wide)
    conv = {"stride": (1, 1), "pad": (1, 1, 1, 1)}
    x = s.weighted("conv", "stem", "image", (8, 8, 8), (8, 3, 3, 3), 8, positive, groups=1, low=0, **conv)
    half = {"kernel": (2, 2), "stride": (2, 2), "pad": (0, 0, 0, 0)}
    x = s.call("maxpool", "pool", (x,), (4, 4, 8), positive, {**half, "low": 0})
    y = s.weighted("depthwise", "block_0", x, (4, 4, 8), (3, 3, 8), 8, wide, **conv)
    y = s.weighted("conv", "block_1", y, (4, 4, 8), (8, 1, 1, 8), 8, wide, groups=1, stride=(1, 1), pad=(0, 0, 0, 0))
    z = s.call("add", "join", (x, y), (4, 4, 8), wide, s.scaled(2))
    z = s.call("clamp", "relu", (z,), (4, 4, 8), wide, {"low": 0})
    z = s.call("concat", "both", (z, x), (4, 4, 16), wide, {"axis": 2, **s.scaled(2)})
    if kind not in ("float32", "int16"):
        table = {"table": s.rng.integers(-128, 128, 256).astype(np.int8)}
        z = s.call("lookup", "curve", (z,), (4, 4, 16), wide, {}, table)
    requant, constants = s.requant(1 / 16, 1)
    z = s.call("avgpool", "mean", (z,), (2, 2, 16), wide, {**half, **requant}, constants)
    z = s.call("permute", "turn", (z,), (16, 2, 2), wide, {"axes": (2, 0, 1)})
    z = s.call("copy", "flat", (z,), (1, 1, 64), wide, {})
    return s.program(name, s.weighted("linear", "head", z, (1, 1, 10), (10, 64), 10, wide))


def tiny(kind: str = "int8", name: str = "net") -> Program:
    """Return a clamp and an addition: quick to compile."""
    s = Sketch(kind, np.random.default_rng(0))
    s.buffer("image", (4, 4, 3), kind)
    x = s.call("clamp", "relu", ("image",), (4, 4, 3), kind, {"low": 0})
    return s.program(name, s.call("add", "sum", ("image", x), (4, 4, 3), kind, s.scaled(2)))


def batch(program: Program, count: int, seed: int = 1) -> np.ndarray:
    """Return inputs (n, H, W, C) over the whole range, the first two at its ends."""
    rng, b = np.random.default_rng(seed), program.buffers[program.input]
    if b.dtype == "float32":
        return rng.normal(0, 2, (count, *b.shape)).astype(np.float32)
    low, high = RANGES[b.dtype]
    x = rng.integers(low, high + 1, (count, *b.shape)).astype(b.dtype)
    for row, value in zip(x, (low, high)):
        row[...] = value
    return x


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same type, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == np.ascontiguousarray(b).tobytes()
