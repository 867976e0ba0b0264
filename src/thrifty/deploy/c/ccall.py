"""What an operator tells the C back end: one `CCall` for each call of the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.text import CTYPES, c_array, c_number, itemsize

Array = npt.NDArray[Any]

SUFFIX = {"int8": "s8", "uint8": "u8", "int16": "s16", "int32": "s32", "float32": "f32"}  # in names of kernels


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
        fields = ",\n".join(f"    .{key} = {c_number(value, 'int32_t')}" for key, value in self.fields.items())
        return f"static const {self.ctype} {name} = {{\n{fields}\n}};"


@dataclass(frozen=True)
class CText:
    """Constants whose C text something else writes; the text may define more names that start with the given one."""

    write: Callable[[str], str]  # name -> definitions
    size_bytes: int  # bytes in flash

    def define(self, name: str) -> str:
        """Return the C definitions."""
        return self.write(name)


@dataclass(frozen=True)
class CCall:
    """How one call looks in C.

    `text` holds the statements of the layer's function, with placeholders: $x (first input), $x0, $x1, ... (inputs),
    $y (output), $scratch, and $key for each constant. They become C identifiers; buffers and arrays are pointers.

    >>> CCall("thrifty_clamp_s8($x, $y, 10, 0, 127);", headers=("clamp.h",)).scratch_bytes
    0
    """

    text: str
    headers: tuple[str, ...]  # files of deploy/c/kernels that declare what the text calls
    constants: Mapping[str, CArray | CStruct | CText] | None = None  # $key -> definition
    scratch_bytes: int = 0  # memory that $scratch points to, 8-byte aligned
    note: str = ""  # a remark for the comment of the layer

    @property
    def constant_bytes(self) -> int:
        """Bytes of all constants in flash."""
        return sum(k.size_bytes for k in (self.constants or {}).values())
