"""Counting what an emulated core executes, per layer: in C where there is a C compiler, else in Python.

An instruction belongs to the layer whose function was entered last: what a layer calls counts for the layer.
Instructions that a conditional (IT) block skips are counted, as QEMU counts them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thrifty.deploy.c.build import cache_folder, run_tool, runtime
from thrifty.errors import ThriftyError, need


@dataclass(frozen=True)
class Block:
    """A basic block that was executed."""

    address: int
    size: int  # bytes
    executed: int
    left: int  # how often the block behind it was not the next one


class Counter(Protocol):
    """What counts: one number per layer, in the order in which the layers were given."""

    def take(self) -> list[int]:
        """Return the instructions of each layer since the last call, and start again."""
        ...

    def blocks(self) -> list[Block]:
        """Return all blocks executed so far."""
        ...


def counter(uc: Any, code: bytes, entries: Sequence[int]) -> Counter:
    """Attach a counter to a Unicorn engine.

    code: the image, from address 0; entries: address of the function of each layer.
    """
    native = native_hook()
    return PythonCounter(uc, code, entries) if native is None else NativeCounter(uc, code, entries, native)


class PythonCounter:
    """The counter as a Python callback: a few microseconds per block."""

    def __init__(self, uc: Any, code: bytes, entries: Sequence[int]) -> None:
        self._code = code
        self._now: list[dict[tuple[int, int], int]] = [{} for _ in entries]
        self._before: dict[tuple[int, int], int] = {}
        self._left: dict[tuple[int, int], int] = {}
        self._length = functools.cache(self._instructions)
        uc.hook_add(need("unicorn", extra="deploy").UC_HOOK_BLOCK, self._hook(dict(zip(entries, self._now))))

    def _hook(self, entries: Mapping[int, dict[tuple[int, int], int]]) -> Callable[..., None]:
        here, last, left = self._now[0], (0, 0), self._left

        def on_block(_uc: Any, address: int, size: int, _data: Any) -> None:
            nonlocal here, last
            if address in entries:
                here = entries[address]
            if address != last[0] + last[1]:
                left[last] = left.get(last, 0) + 1
            last = (address, size)
            here[last] = here.get(last, 0) + 1

        return on_block

    def _instructions(self, block: tuple[int, int]) -> int:
        return instructions_in(self._code[block[0] : block[0] + block[1]])

    def take(self) -> list[int]:
        """Return the instructions of each layer since the last call, and start again."""
        totals = []
        for blocks in self._now:
            totals.append(sum(n * self._length(block) for block, n in blocks.items()))
            for block, n in blocks.items():
                self._before[block] = self._before.get(block, 0) + n
            blocks.clear()
        return totals

    def blocks(self) -> list[Block]:
        """Return all blocks executed up to the last `take`."""
        return [Block(*block, n, self._left.get(block, 0)) for block, n in sorted(self._before.items())]


class _State(ctypes.Structure):
    """`counter` of runtime/hook.c."""

    _fields_ = (
        ("code", ctypes.c_char_p),
        ("half_words", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("entry", "size", "length", "executed", "left", "instructions")),
        *((name, ctypes.c_uint64) for name in ("layer", "last", "behind")),
    )


class NativeCounter:
    """The counter as compiled C: a few nanoseconds per block."""

    def __init__(self, uc: Any, code: bytes, entries: Sequence[int], hook: Any) -> None:
        count = len(code) // 2 + 1
        self._entry = np.zeros(count, np.uint16)
        for layer, address in enumerate(entries):
            self._entry[address // 2] = layer + 1
        self._size, self._length = np.zeros((2, count), np.uint32)
        self._executed, self._left = np.zeros((2, count), np.uint64)
        self._instructions = np.zeros(len(entries), np.uint64)
        arrays = (self._entry, self._size, self._length, self._executed, self._left, self._instructions)
        self._state = _State(code, count, *(a.ctypes.data for a in arrays), 0, 0, 0)
        self._keep = (code, hook)
        _attach(uc, hook, self._state)

    def take(self) -> list[int]:
        """Return the instructions of each layer since the last call, and start again."""
        totals = [int(n) for n in self._instructions]
        self._instructions[:] = 0
        return totals

    def blocks(self) -> list[Block]:
        """Return all blocks executed so far."""
        found = np.flatnonzero(self._executed)
        return [Block(2 * int(i), int(self._size[i]), int(self._executed[i]), int(self._left[i])) for i in found]


def _attach(uc: Any, hook: Any, state: _State) -> None:
    """Register a C function as block hook: Unicorn's Python class takes Python functions only."""
    unicorn = need("unicorn", extra="deploy")
    library = need("unicorn.unicorn_py3.unicorn", extra="deploy").uclib
    handle = ctypes.c_size_t()
    everywhere = (ctypes.c_uint64(1), ctypes.c_uint64(0))
    function, user = (
        ctypes.cast(hook.on_block, ctypes.c_void_p),
        ctypes.cast(ctypes.byref(state), ctypes.c_void_p),
    )
    status = library.uc_hook_add(uc._uch, ctypes.byref(handle), unicorn.UC_HOOK_BLOCK, function, user, *everywhere)
    if status != 0:
        raise ThriftyError(f"Unicorn refused the block hook with status {status}")


@functools.cache
def native_hook() -> ctypes.CDLL | None:
    """Return runtime/hook.c as a loaded library; None without a C compiler or with another Unicorn inside."""
    cc = shutil.which("cc")
    try:
        need("unicorn.unicorn_py3.unicorn", extra="deploy").uclib.uc_hook_add  # noqa: B018 - is it there?
        return None if cc is None else ctypes.CDLL(str(_compiled(cc, runtime("hook.c"))))
    except (AttributeError, OSError, ThriftyError):
        return None


def _compiled(cc: str, source: Path) -> Path:
    library = cache_folder() / f"hook-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            fresh = Path(scratch) / library.name
            run_tool([cc, "-std=c99", "-O2", "-shared", "-fPIC", str(source), "-o", str(fresh)])
            os.replace(fresh, library)
    return library


def instructions_in(code: bytes) -> int:
    """Return the number of Thumb instructions in a basic block.

    An instruction is 4 bytes long when the top five bits of its first half word are 11101, 11110 or 11111.

    >>> instructions_in(bytes.fromhex("00bf7047")), instructions_in(bytes.fromhex("fff7feff"))
    (2, 1)
    """
    position = count = 0
    while position < len(code):
        position += 4 if code[position + 1] >= 0xE8 else 2
        count += 1
    return count
