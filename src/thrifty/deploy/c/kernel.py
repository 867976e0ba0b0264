"""A C kernel with its packed constants: what `pack` returns and the emitter writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from thrifty.deploy.c.text import c_array

Array = npt.NDArray[Any]
Member = str | int | tuple[int, ...]  # a C expression; a 16-bit size; several of them in a nested struct
Members = list[tuple[str, Member]]
STREAM = "/* Weights, biases and, where there are any, multipliers, in the order in which the kernel reads them. */"


@dataclass(frozen=True)
class Kernel:
    """A C kernel with the packed constants of one call."""

    variant: str  # which kernel, for people and for tests
    headers: tuple[str, ...]  # of kernels/, each includes what it needs
    function: str
    struct: str  # C type of the constants
    instances: tuple[str, ...]  # macro calls that define the inner kernels; to be written once, before the constants
    arrays: tuple[tuple[str, str, Array], ...]  # (suffix, C type, values)
    members: tuple[tuple[str, Member], ...]  # of the struct; "{name}" stands for the name of the constants
    scratch_bytes: int = 0
    struct_bytes: int = 64

    @property
    def flash_bytes(self) -> int:
        """Bytes of the arrays and of the struct."""
        return sum(values.nbytes for _, _, values in self.arrays) + self.struct_bytes

    @property
    def largest(self) -> int:
        """The largest of the 16-bit sizes."""
        sizes = [m if isinstance(m, tuple) else (m,) for _, m in self.members if not isinstance(m, str)]
        return max(size for group in sizes for size in group)

    def constants(self, name: str) -> str:
        """Return C text: the constants as `name`; they need the inner kernels of `instances`."""
        parts: list[str] = []
        for suffix, ctype, values in self.arrays:
            parts += [STREAM] if suffix == "stream" else []
            parts.append(c_array(f"{name}_{suffix}", values, ctype))
        members = [f"    .{key} = {_initialiser(value).replace('{name}', name)}," for key, value in self.members]
        return "\n".join([*parts, f"static const {self.struct} {name} = {{", *members, "};"])

    def call(self, name: str, x: str, y: str, scratch: str) -> str:
        """Return the C statement that runs the kernel with the constants `name`."""
        return f"{self.function}(&{name}, {x}, {y}, {scratch if self.scratch_bytes else 'NULL'});"


def _initialiser(member: Member) -> str:
    return "{" + ", ".join(map(str, member)) + "}" if isinstance(member, tuple) else str(member)
