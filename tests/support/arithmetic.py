"""The integer rule as compiled C: one shared library for this computer, one image for an emulated Cortex-M."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import unicorn
from elftools.elf.elffile import ELFFile
from unicorn import arm_const

from thrifty.deploy.c.build import CrossCompiler
from thrifty.deploy.targets import target

KERNELS = Path(str(resources.files("thrifty.deploy.c").joinpath("kernels")))
LOOPS = """
#include "arith.h"
void all_round(const int32_t *v, const int32_t *s, const int32_t *t, int32_t *y, int32_t n)
{ (void)t; for (int32_t i = 0; i < n; i++) y[i] = thrifty_round_shift(v[i], s[i]); }
void all_floor(const int32_t *v, const int32_t *s, const int32_t *t, int32_t *y, int32_t n)
{ (void)t; for (int32_t i = 0; i < n; i++) y[i] = thrifty_floor_shift(v[i], s[i]); }
void all_scale(const int32_t *v, const int32_t *s, const int32_t *t, int32_t *y, int32_t n)
{ for (int32_t i = 0; i < n; i++) y[i] = thrifty_scale(v[i], s[i], t[i]); }
void all_clamp(const int32_t *v, const int32_t *s, const int32_t *t, int32_t *y, int32_t n)
{ for (int32_t i = 0; i < n; i++) y[i] = thrifty_clamp(v[i], s[i], t[i]); }
"""
BASE, STOP, STACK, DATA = 0x0, 0x0FF0_0000, 0x2000_F000, 0x2100_0000


@dataclass(frozen=True)
class CRule:
    """Calls one of the four functions on int32 arrays (v, s, t), which broadcast."""

    call: Callable[[str, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, name: str, v, s, t=0) -> np.ndarray:
        arrays = np.broadcast_arrays(*(np.asarray(a, dtype=np.int32) for a in (v, s, t)))
        flat = [np.ascontiguousarray(a).ravel() for a in arrays]
        return self.call(f"all_{name}", *flat).reshape(arrays[0].shape).astype(np.int64)


def kernels_in(folder: Path, change: Callable[[str], str] = lambda text: text) -> Path:
    """Copy arith.h and what it includes, changed or not, with the loops beside it; return the C file."""
    for name in ("arith.h", "simd.h"):
        (folder / name).write_text(change((KERNELS / name).read_text()))
    (folder / "loops.c").write_text(LOOPS)
    return folder / "loops.c"


def on_host(folder: Path, change: Callable[[str], str] = lambda text: text, compiler: str = "cc") -> CRule:
    """Compile for this computer."""
    library = folder / "loops.so"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", "-shared", "-fPIC"]
    subprocess.run([shutil.which(compiler) or compiler, *flags, kernels_in(folder, change), "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))

    def call(name: str, v: np.ndarray, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        y = np.empty_like(v)
        getattr(loaded, name)(*(ctypes.c_void_p(a.ctypes.data) for a in (v, s, t, y)), ctypes.c_int32(len(v)))
        return y

    return CRule(call)


def on_target(folder: Path, core: str) -> CRule:
    """Compile for a Cortex-M core, and run in the emulator."""
    chosen = target(core)
    tool = CrossCompiler.find("auto", chosen)
    elf = folder / "loops.elf"
    source = kernels_in(folder)
    flags = [
        "-std=c99",
        "-O2",
        "-ffreestanding",
        "-nostdlib",
        "-static",
        f"-Wl,-Ttext={BASE:#x}",
        "-Wl,-e,all_round",
    ]
    subprocess.run(
        [*tool.program, *tool.flags, *flags, source, *tool.libraries, "-o", elf],
        check=True,
        capture_output=True,
    )
    with elf.open("rb") as stream:
        file = ELFFile(stream)
        segments = [(s["p_vaddr"], s.data()) for s in file.iter_segments() if s["p_type"] == "PT_LOAD"]
        symbols = {s.name: s["st_value"] for s in file.get_section_by_name(".symtab").iter_symbols()}
    uc = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
    uc.ctl_set_cpu_model(getattr(arm_const, chosen.unicorn))
    for start, size in ((0, 1 << 24), (STOP, 0x1000), (0x2000_0000, 1 << 28)):
        uc.mem_map(start, size)
    for address, data in segments:
        uc.mem_write(address, data)

    def call(name: str, v: np.ndarray, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        room = 4 * len(v) + 64
        places = [DATA + i * room for i in range(4)]
        for place, array in zip(places, (v, s, t)):
            uc.mem_write(place, array.tobytes())
        uc.mem_write(STACK, len(v).to_bytes(4, "little"))
        for register, value in zip(range(4), places):
            uc.reg_write(getattr(arm_const, f"UC_ARM_REG_R{register}"), value)
        uc.reg_write(arm_const.UC_ARM_REG_SP, STACK)
        uc.reg_write(arm_const.UC_ARM_REG_LR, STOP | 1)
        uc.emu_start(symbols[name] | 1, STOP)
        return np.frombuffer(bytes(uc.mem_read(places[3], 4 * len(v))), np.int32)

    return CRule(call)
