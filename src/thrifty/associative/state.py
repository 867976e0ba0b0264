"""The words that a learner keeps: one block of bytes, the same on this computer and on the microcontroller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError

Array = npt.NDArray[Any]

ITEMS = {"uint32": 4, "int16": 2, "uint16": 2, "uint8": 1}


@dataclass(frozen=True)
class Field:
    """One array of the state; the first axis runs over the classes unless there is one for all (`shared`)."""

    name: str
    dtype: str  # a key of ITEMS
    shape: tuple[int, ...]
    shared: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * ITEMS[self.dtype]


class State:
    """The state of a learner: named arrays that are views of one block of bytes, little-endian.

    The arrays lie one after the other, those of wide numbers first, which is how a C compiler lays out the struct of
    the same members; the block is padded to a multiple of four bytes. All bytes zero is the state of a learner that
    has seen nothing.

    >>> s = State([Field("seen", "uint32", (2,)), Field("cells", "uint8", (2, 3))])
    >>> s["seen"][1] = 7
    >>> len(s.tobytes()), s.tobytes()[4]
    (16, 7)
    """

    def __init__(self, fields: Sequence[Field], data: bytes | None = None) -> None:
        """data: the bytes of a state of the same fields. Raises DataError when there are more or fewer."""
        self.fields = tuple(sorted(fields, key=lambda f: -ITEMS[f.dtype]))
        total = -(-sum(f.size_bytes for f in self.fields) // 4) * 4
        if data is not None and len(data) != total:
            raise DataError(f"a state of {len(data)} bytes was given; this learner's has {total}")
        self._bytes = np.zeros(total, np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
        self._views: dict[str, Array] = {}
        place = 0
        for f in self.fields:
            flat = self._bytes[place : place + f.size_bytes]
            self._views[f.name] = flat.view(np.dtype(f.dtype).newbyteorder("<")).reshape(f.shape)
            place += f.size_bytes

    def __getitem__(self, name: str) -> Array:
        """Return one array; to write into it is to change the state."""
        return self._views[name]

    @property
    def size_bytes(self) -> int:
        """Bytes, padding included."""
        return self._bytes.size

    def tobytes(self) -> bytes:
        """Return the block."""
        return self._bytes.tobytes()

    def copy(self) -> State:
        """Return a state of its own with the same bytes."""
        return State(self.fields, self.tobytes())

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return (State, (self.fields, self.tobytes()))

    def clear(self) -> None:
        """Forget everything."""
        self._bytes[:] = 0

    def clear_class(self, slot: int) -> None:
        """Set the words of one class to zero; those of all others stay."""
        for f in self.fields:
            if not f.shared:
                self._views[f.name][slot] = 0

    def widened(self, fields: Sequence[Field]) -> State:
        """Return a state with room for more classes, the words of the old ones unchanged."""
        wide = State(fields)
        for f in self.fields:
            old = self._views[f.name]
            if f.shared and old.shape != wide[f.name].shape:  # one bit per class
                wide[f.name][: len(old)] = old
            elif f.shared:
                wide[f.name][:] = old
            else:
                wide[f.name][: len(old)] = old
        return wide
