"""Run an image on an emulated Cortex-M core inside this process: outputs, executed instructions, stack.

Only block hooks are used: Unicorn's memory hooks disturb conditional (IT) blocks and give wrong results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.build import Image
from thrifty.deploy.c.counting import Counter, counter
from thrifty.deploy.c.cycles import modelled_cycles
from thrifty.deploy.c.manifest import as_batch
from thrifty.errors import ToolError, need

Array = npt.NDArray[Any]

STOP = 0x0FF0_0000  # where the return address points to: nothing else lies there
MEMORY = ((0x0000_0000, 64 << 20), (STOP, 0x1000), (0x2000_0000, 32 << 20))
PAINT = 0xA5
STACK_LIMIT = 1 << 18  # bytes painted below the initial stack pointer
SECONDS = 600


@dataclass(frozen=True, eq=False)
class Emulation:
    """What one image did on some inputs. Instructions and stack are of the input that took most."""

    outputs: Array  # (n, H, W, C), the type of the output buffer
    stack_bytes: int  # measured: high-water mark
    ram_bytes: int  # measured: .data, .bss and the stack
    instructions: int | None = None  # measured: executed instructions of one run; None when they were not counted
    per_layer: Mapping[str, int] = field(default_factory=dict)  # name of the call -> its instructions
    instructions_each: tuple[int, ...] = ()  # of every input
    cycles: int | None = None  # modelled, mean of the inputs; see cycles.py. None when not counted, or no Cortex-M4


def emulate(image: Image, inputs: npt.ArrayLike, count: bool = True) -> Emulation:
    """Run the image on each input and return outputs and costs.

    inputs: (n, H, W, C) or (H, W, C), integers (reals for a float32 program) that fit the input's type;
    count: whether to count instructions; without, a run takes a tenth of the time.
    Raises MissingExtra without unicorn, DataError on inputs of another shape or range,
    ToolError when the core faults.
    """
    batch = as_batch(image.manifest, inputs)
    core = Core(image)
    counts = core.counter() if count else None
    outputs: list[Array] = []
    each: list[list[int]] = []
    for example in batch:
        outputs.append(core.run(example))
        if counts:
            each.append(counts.take())
    stack = core.stack_bytes()
    totals = tuple(sum(layers) for layers in each)
    worst = dict(zip(core.layers, each[totals.index(max(totals))])) if each else {}
    return Emulation(
        outputs=np.stack(outputs),
        stack_bytes=stack,
        ram_bytes=image.data_bytes + stack,
        instructions=max(totals, default=None),
        per_layer={layer.name: worst.get(layer.function, 0) for layer in image.manifest.layers} if each else {},
        instructions_each=totals,
        cycles=core.cycles(counts, len(batch)) if counts else None,
    )


class Core:
    """A Cortex-M core with the image in its memory, all static data zero."""

    def __init__(self, image: Image) -> None:
        """Raises MissingExtra without unicorn."""
        self.image = image
        self.unicorn = need("unicorn", extra="deploy")
        self.arm = need("unicorn.arm_const", extra="deploy")
        u = self.unicorn
        self.uc = u.Uc(u.UC_ARCH_ARM, u.UC_MODE_THUMB | u.UC_MODE_MCLASS)
        self.uc.ctl_set_cpu_model(getattr(self.arm, image.target.unicorn or ""))
        for address, size in MEMORY:
            self.uc.mem_map(address, size)
        self.flash_end = 0
        self.symbols, self.functions = self._load()
        self.top = self.symbols["_stack_top"]
        self.uc.mem_write(self.top - STACK_LIMIT, bytes([PAINT]) * STACK_LIMIT)
        name = image.manifest.name
        self.entry = self.symbols[f"{name}_run"]
        self.input, self.output = self._pointer(f"{name}_input"), self._pointer(f"{name}_output")

    def _load(self) -> tuple[dict[str, int], dict[str, int]]:
        elffile = need("elftools.elf.elffile", extra="deploy")
        with self.image.elf.open("rb") as stream:
            elf = elffile.ELFFile(stream)
            for segment in elf.iter_segments():
                if segment["p_type"] == "PT_LOAD" and segment["p_filesz"]:
                    self.uc.mem_write(segment["p_vaddr"], segment.data())
                    if segment["p_vaddr"] < STOP:
                        self.flash_end = max(self.flash_end, segment["p_vaddr"] + segment["p_filesz"])
            symbols = list(elf.get_section_by_name(".symtab").iter_symbols())
        values = {s.name: int(s["st_value"]) for s in symbols}
        functions = {s.name: int(s["st_value"]) & ~1 for s in symbols if s["st_info"]["type"] == "STT_FUNC"}
        return values, functions

    def _pointer(self, symbol: str) -> int:
        return int.from_bytes(self.uc.mem_read(self.symbols[symbol], 4), "little")

    @property
    def layers(self) -> list[str]:
        """The functions that instructions are counted for: the whole run, then the layers."""
        manifest = self.image.manifest
        return [f"{manifest.name}_run", *(layer.function for layer in manifest.layers if layer.function)]

    def counter(self, more: Sequence[str] = ()) -> Counter:
        """Count from now on, for the layers and for `more` functions."""
        names = [*self.layers, *more]
        if missing := [name for name in names if name not in self.functions]:
            compiler = self.image.compiler
            raise ToolError(f"{compiler} removed {', '.join(missing)} from the image: its code is not the program's")
        return counter(self.uc, self._flash(), [self.functions[name] for name in names])

    def cycles(self, counts: Counter, runs: int) -> int | None:
        """Return the modelled cycles of a mean run; None for cores without a model."""
        if self.image.target.core != "cortex-m4":
            return None
        return round(modelled_cycles(self._flash(), counts.blocks()) / runs)

    def _flash(self) -> bytes:
        return bytes(self.uc.mem_read(0, self.flash_end))

    def run(self, example: Array) -> Array:
        """Write one input, run the model, read the output."""
        port = self.image.manifest.output
        self.uc.mem_write(self.input, example.tobytes())
        self.call(self.entry)
        data = bytes(self.uc.mem_read(self.output, port.size_bytes))
        return np.frombuffer(data, dtype=port.dtype).reshape(port.shape)

    def call(self, entry: int, argument: int = 0) -> int:
        """Call the C function at an address with one int32 argument and return its int32 result."""
        self.uc.reg_write(self.arm.UC_ARM_REG_SP, self.top)
        self.uc.reg_write(self.arm.UC_ARM_REG_LR, STOP | 1)
        self.uc.reg_write(self.arm.UC_ARM_REG_R0, argument & 0xFFFFFFFF)
        try:
            self.uc.emu_start(entry | 1, STOP, timeout=SECONDS * 1_000_000)
        except self.unicorn.UcError as err:
            raise ToolError(f"the emulated {self.image.target.core} stopped {self._where()}: {err}") from err
        if self.uc.reg_read(self.arm.UC_ARM_REG_PC) & ~1 != STOP:
            raise ToolError(
                f"the emulated {self.image.target.core} did not finish in {SECONDS} s; it was {self._where()}"
            )
        result = int(self.uc.reg_read(self.arm.UC_ARM_REG_R0))
        return result - (1 << 32) if result >> 31 else result

    def read(self, symbol: str, count: int) -> bytes:
        """Return `count` bytes of memory from a symbol on."""
        return bytes(self.uc.mem_read(self.symbols[symbol], count))

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
