"""What every operator of a program offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from thrifty.deploy.c.ccall import CCall
from thrifty.deploy.ops.builder import Builder
from thrifty.deploy.program import Array, Buffer, Call, Program
from thrifty.graph import Graph, Node

KINDS = ("int8", "int16", "float32")


class Operator(ABC):
    """One operator: which graph nodes become it, how, and what it computes. `OPS` holds the instances."""

    name: ClassVar[str]  # in programs
    lowers: ClassVar[tuple[str, ...]] = ()  # operators of a graph that become this one
    attrs: ClassVar[frozenset[str]] = frozenset()  # their attributes that are understood
    kinds: ClassVar[tuple[str, ...]] = KINDS  # element types that `example` can make

    def refuse(self, node: Node, graph: Graph) -> Iterator[str]:
        """Yield a clause for each reason not to lower `node`, each with the nearest supported form."""
        return iter(())

    def lower(self, node: Node, b: Builder) -> None:
        """Append the calls of `node`. Raises KnobError when its constants do not fit."""
        raise NotImplementedError(f"no graph operator becomes {self.name}")

    @abstractmethod
    def compute(self, call: Call, inputs: Sequence[Array], out: Buffer) -> Array:
        """Return the output (n, H, W, C) in the type of `out`; inputs: the same of their buffers."""

    @abstractmethod
    def c(self, call: Call, program: Program) -> CCall:
        """Return how the call looks in C: kernels, packed constants, statements."""

    @abstractmethod
    def example(self, rng: np.random.Generator, kind: str) -> Graph:
        """Return a small random graph that uses this operator. kind: one of `kinds`."""

    def in_place(self, call: Call) -> tuple[int, ...]:
        """Return which inputs' memory the output may take, if they are not read later and as wide."""
        return ()
