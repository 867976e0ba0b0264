"""What an operator tells the C back end: one `CCall` for each call of the program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.text import CTYPES, c_array, c_float, c_number, itemsize
from thrifty.deploy.program import Buffer, Call

Array = npt.NDArray[Any]

SUFFIXES = {"int8": "s8", "uint8": "u8", "int16": "s16", "int32": "s32", "float32": "f32"}


@dataclass(frozen=True)
class CArray:
    """An array of constants, in the order in which the kernel reads it."""

    values: Array
    ctype: str = ""  # the C type of an element; found from the array where left out
    note: str = ""  # how it is packed, for the comment above it

    @property
    def element(self) -> str:
        """The C type of an element."""
        return self.ctype or CTYPES[str(np.asarray(self.values).dtype)]

    @property
    def size_bytes(self) -> int:
        """Bytes in flash."""
        return itemsize(self.element) * np.asarray(self.values).size

    def define(self, name: str) -> str:
        """Return the C definition."""
        note = f"/* {self.note} */\n" if self.note else ""
        return note + c_array(name, np.asarray(self.values), self.element)


@dataclass(frozen=True)
class CStruct:
    """A constant struct of 32-bit numbers."""

    ctype: str
    fields: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        """Bytes in flash."""
        return 4 * len(self.fields)

    def define(self, name: str) -> str:
        """Return the C definition."""
        fields = ",\n".join(f"    .{key} = {c_number(v, 'int32_t')}" for key, v in self.fields.items())
        return f"static const {self.ctype} {name} = {{\n{fields}\n}};"


@dataclass(frozen=True)
class CText:
    """Constants whose C text something else writes, perhaps with more names that start with the given one."""

    write: Callable[[str], str]  # name -> definitions
    size_bytes: int  # bytes in flash

    def define(self, name: str) -> str:
        """Return the C definitions."""
        return self.write(name)


Constant = CArray | CStruct | CText


@dataclass(frozen=True)
class CCall:
    """How one call looks in C.

    `text` holds the statements of the layer's function, with placeholders: $x (first input), $x0, $x1, ...
    (inputs), $y (output), $scratch, and $key for each constant. They become C identifiers; buffers and arrays
    are pointers.

    >>> CCall("thrifty_clamp_s8($x, $y, 10, 0, 127);", headers=("clamp.h",)).scratch_bytes
    0
    """

    text: str
    headers: tuple[str, ...]  # files of deploy/c/kernels that declare what the text calls
    constants: Mapping[str, Constant] | None = None  # $key -> definition
    scratch_bytes: int = 0  # memory that $scratch points to, 8-byte aligned
    note: str = ""  # a remark for the comment of the layer
    instances: tuple[str, ...] = ()  # macro calls that define inner kernels; equal ones are emitted once
    free_in_place: bool = False  # nothing is to be done when the output has the memory of the first input

    @property
    def constant_bytes(self) -> int:
        """Bytes of all constants in flash."""
        return sum(k.size_bytes for k in (self.constants or {}).values())


def suffix(*buffers: Buffer) -> str:
    """Return the end of the name of a kernel for buffers of these types.

    >>> suffix(Buffer("a", (1, 1, 4), "int8"), Buffer("b", (1, 1, 4), "uint8"))
    's8_u8'
    """
    return "_".join(SUFFIXES[b.dtype] for b in buffers)


def limits(call: Call, dtype: str) -> str:
    """Return the arguments "low, high" of a call whose output has this type.

    >>> limits(Call("clamp", "c", ("x",), "y", {"low": 0.0, "high": float("inf")}), "float32")
    '0.0f, THRIFTY_INFINITY'
    """
    return ", ".join(_limit(call.attrs[key], dtype) for key in ("low", "high"))


def _limit(value: float, dtype: str) -> str:
    if dtype != "float32":
        return str(int(value))
    return c_float(value) if math.isfinite(value) else "THRIFTY_INFINITY" if value > 0 else "-THRIFTY_INFINITY"
