"""Run an image on an emulated Cortex-M core inside this process: outputs, executed instructions, stack.

Only block hooks are used: Unicorn's memory hooks disturb conditional (IT) blocks and give wrong results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.build import Image
from thrifty.deploy.c.manifest import as_batch
from thrifty.errors import ToolError, need

Array = npt.NDArray[Any]

STOP = 0x0FF0_0000  # where the return address points to: nothing else lies there
MEMORY = ((0x0000_0000, 64 << 20), (STOP, 0x1000), (0x2000_0000, 32 << 20))
PAINT = 0xA5
STACK_LIMIT = 1 << 18  # bytes painted below the initial stack pointer
SECONDS = 600


@dataclass(frozen=True)
class Emulation:
    """What one image did on some inputs. Instructions and stack are of the input that took most."""

    outputs: Array  # (n, H, W, C), the type of the output buffer
    stack_bytes: int  # measured: high-water mark
    ram_bytes: int  # measured: .data, .bss and the stack
    instructions: int | None = (
        None  # measured: executed instructions of one run; None when they were not counted
    )
    per_layer: Mapping[str, int] = field(default_factory=dict)  # name of the call -> its instructions
    instructions_each: tuple[int, ...] = ()  # of every input


def emulate(image: Image, inputs: npt.ArrayLike, count: bool = True) -> Emulation:
    """Run the image on each input and return outputs and costs.

    inputs: (n, H, W, C) or (H, W, C), integers (reals for a float32 program) that fit the input's type;
    count: whether to count instructions; without, a run takes a tenth of the time.
    Raises MissingExtra without unicorn, DataError on inputs of another shape or range, ToolError when the core
    faults.
    """
    batch = as_batch(image.manifest, inputs)
    core = _Core(image)
    counter = _Counter(core) if count else None
    outputs, totals, best = [], [], {}
    for example in batch:
        outputs.append(core.run(example))
        if counter:
            layers = counter.take()
            totals.append(sum(layers.values()))
            if totals[-1] == max(totals):
                best = layers
    stack = core.stack_bytes()
    return Emulation(
        np.stack(outputs),
        stack,
        image.data_bytes + stack,
        max(totals) if totals else None,
        {layer.name: best.get(layer.function, 0) for layer in image.manifest.layers} if best else {},
        tuple(totals),
    )


class _Core:
    """A Cortex-M core with the image in its memory."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.unicorn = need("unicorn", extra="deploy")
        self.arm = need("unicorn.arm_const", extra="deploy")
        u = self.unicorn
        self.uc = u.Uc(u.UC_ARCH_ARM, u.UC_MODE_THUMB | u.UC_MODE_MCLASS)
        self.uc.ctl_set_cpu_model(getattr(self.arm, image.target.unicorn or ""))
        for address, size in MEMORY:
            self.uc.mem_map(address, size)
        self.symbols, self.functions = self._load()
        self.top = self.symbols["_stack_top"]
        self.uc.mem_write(self.top - STACK_LIMIT, bytes([PAINT]) * STACK_LIMIT)
        name = image.manifest.name
        self.entry = self.symbols[f"{name}_run"] | 1
        self.input, self.output = self._pointer(f"{name}_input"), self._pointer(f"{name}_output")

    def _load(self) -> tuple[dict[str, int], dict[str, int]]:
        elffile = need("elftools.elf.elffile", extra="deploy")
        with self.image.elf.open("rb") as stream:
            elf = elffile.ELFFile(stream)
            for segment in elf.iter_segments():
                if segment["p_type"] == "PT_LOAD" and segment["p_filesz"]:
                    self.uc.mem_write(segment["p_vaddr"], segment.data())
            symbols = list(elf.get_section_by_name(".symtab").iter_symbols())
        values = {s.name: int(s["st_value"]) for s in symbols}
        functions = {s.name: int(s["st_value"]) & ~1 for s in symbols if s["st_info"]["type"] == "STT_FUNC"}
        return values, functions

    def _pointer(self, symbol: str) -> int:
        return int.from_bytes(self.uc.mem_read(self.symbols[symbol], 4), "little")

    def run(self, example: Array) -> Array:
        """Write one input, run the model, read the output."""
        port = self.image.manifest.output
        self.uc.mem_write(self.input, example.tobytes())
        self.uc.reg_write(self.arm.UC_ARM_REG_SP, self.top)
        self.uc.reg_write(self.arm.UC_ARM_REG_LR, STOP | 1)
        try:
            self.uc.emu_start(self.entry, STOP, timeout=SECONDS * 1_000_000)
        except self.unicorn.UcError as err:
            raise ToolError(f"the emulated {self.image.target.core} stopped {self._where()}: {err}") from err
        if self.uc.reg_read(self.arm.UC_ARM_REG_PC) & ~1 != STOP:
            raise ToolError(
                f"the emulated {self.image.target.core} did not finish in {SECONDS} s; it was {self._where()}"
            )
        data = bytes(self.uc.mem_read(self.output, port.size_bytes))
        return np.frombuffer(data, dtype=port.dtype).reshape(port.shape)

    def stack_bytes(self) -> int:
        """Bytes between the initial stack pointer and the lowest byte ever written."""
        painted = np.frombuffer(bytes(self.uc.mem_read(self.top - STACK_LIMIT, STACK_LIMIT)), np.uint8)
        used = np.flatnonzero(painted != PAINT)
        if used.size and used[0] < 8:
            raise ToolError(f"the model used more than {STACK_LIMIT} bytes of stack")
        return int(STACK_LIMIT - used[0]) if used.size else 0

    def _where(self) -> str:
        pc = self.uc.reg_read(self.arm.UC_ARM_REG_PC) & ~1
        before = [(address, name) for name, address in self.functions.items() if address <= pc]
        return f"in {max(before)[1]}, at {pc:#x}" if before else f"at {pc:#x}"


class _Counter:
    """Counts executions of basic blocks, per layer: the layer function entered last gets them."""

    def __init__(self, core: _Core) -> None:
        self.core = core
        run = f"{core.image.manifest.name}_run"
        names = [run, *(layer.function for layer in core.image.manifest.layers if layer.function)]
        self.blocks: dict[str, dict[tuple[int, int], int]] = {name: {} for name in names}
        self.entries = {core.functions[name]: self.blocks[name] for name in names}
        self.lengths: dict[tuple[int, int], int] = {}
        core.uc.hook_add(core.unicorn.UC_HOOK_BLOCK, self._hook(self.blocks[run]))

    def _hook(self, here: dict[tuple[int, int], int]) -> Callable[..., None]:
        entries = self.entries

        def on_block(_uc: Any, address: int, size: int, _data: Any) -> None:
            nonlocal here
            if address in entries:
                here = entries[address]
            block = (address, size)
            here[block] = here.get(block, 0) + 1

        return on_block

    def take(self) -> dict[str, int]:
        """Return the instructions of each function since the last call, and start again."""
        result = {}
        for name, blocks in self.blocks.items():
            result[name] = sum(n * self._length(block) for block, n in blocks.items())
            blocks.clear()
        return result

    def _length(self, block: tuple[int, int]) -> int:
        if block not in self.lengths:
            address, size = block
            self.lengths[block] = instructions_in(bytes(self.core.uc.mem_read(address, size)))
        return self.lengths[block]


def instructions_in(code: bytes) -> int:
    """Return the number of Thumb instructions in a basic block.

    An instruction is 4 bytes long when the top five bits of its first half word are 11101, 11110 or 11111.

    >>> instructions_in(bytes.fromhex("00bf" "7047")), instructions_in(bytes.fromhex("fff7feff"))
    (2, 1)
    """
    position = count = 0
    while position < len(code):
        position += 4 if code[position + 1] >= 0xE8 else 2
        count += 1
    return count
