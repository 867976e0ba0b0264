"""Hard swish on float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from thrifty import integer
from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops.example import Example
from thrifty.deploy.ops.operator import Operator
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph


class HardSwish(Operator):
    """y = (x * clamp(x + 3, 0, 6)) / 6, each step rounded; `lookup`, its integer form, lowers both."""

    name = "hardswish"
    kinds: ClassVar[tuple[str, ...]] = ("float32",)

    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Compute it."""
        return integer.hardswish(inputs[0])

    def c(self, call: Call, program: Program) -> CCall:
        """Call thrifty_hardswish_f32."""
        y = program.buffers[call.output]
        return CCall(f"thrifty_hardswish_f32($x, $y, {y.size});", ("hardswish.h",))

    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a hard swish on the input."""
        e = Example(rng, kind)
        x = e.input(e.map_shape(channels=int(rng.integers(1, 9))))
        return e.graph(e.unary(x, "hardswish"))

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Allow the input."""
        return (0,)
