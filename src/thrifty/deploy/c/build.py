"""Compile emitted C for a Cortex-M core and say what the linked image takes."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from thrifty.deploy.c.manifest import Manifest
from thrifty.deploy.targets import Target
from thrifty.deploy.targets import target as find_target
from thrifty.errors import KnobError, MissingExtra, ToolError, need

WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
EXACT = ("-ffp-contract=off",)  # a fused multiply-add rounds once where the program rounds twice
BARE = ("-ffreestanding", "-ffunction-sections", "-fdata-sections", "-fomit-frame-pointer",
        "-fno-asynchronous-unwind-tables", "-fno-unwind-tables")  # fmt: skip
COMPILERS = ("auto", "gcc", "zig")
OPTIMISATIONS = ("-O0", "-O1", "-O2", "-O3", "-Os")
TOOL_SECONDS = 600
SHF_ALLOC = 2  # ELF: the section is in the memory of the target


@dataclass(frozen=True)
class Image:
    """A linked image of an emitted model: start-up code, the model, no test vectors."""

    folder: Path  # the emitted C
    manifest: Manifest
    target: Target
    compiler: str  # "gcc" or "zig"
    version: str  # first line of the compiler's --version
    command: str  # how the model was compiled
    elf: Path
    sections: Mapping[str, int]  # bytes of each section that takes memory on the target
    flash_bytes: int  # code and constants, initial values of data included
    data_bytes: int  # .data and .bss, the arena included; add the stack (Emulation.stack_bytes) for the RAM

    @property
    def objects(self) -> Path:
        """The compiled model, to be linked with other start-up code."""
        return self.elf.with_name("model.o")


def build(folder: str | Path, target: str | Target, opt: str = "-O3", compiler: str = "auto") -> Image:
    """Compile and link the emitted model in `folder` for a Cortex-M target, into folder/build/.

    compiler: "gcc" (arm-none-eabi-gcc), "zig" (zig cc, from PyPI) or "auto": gcc where it is installed.
    Raises ToolError with the compiler's own first lines, MissingExtra when there is no compiler,
    KnobError for options outside their range and for the host, which run_host serves.
    """
    folder, chosen = Path(folder), find_target(target)
    if chosen.core == "host":
        raise KnobError("build makes images for Cortex-M targets; for this computer use run_host")
    if opt not in OPTIMISATIONS:
        raise KnobError(f"opt is '{opt}'; it must be one of {', '.join(OPTIMISATIONS)}")
    manifest = Manifest.read(folder)
    tool = CrossCompiler.find(compiler, chosen)
    place = folder / "build" / f"{chosen.core}-{tool.name}{opt}"
    place.mkdir(parents=True, exist_ok=True)
    command = tool.compile(folder / f"{manifest.name}.c", place / "model.o", (opt,))
    start = [runtime("start.c"), runtime("bare.c")]
    elf = tool.link(place / "model.elf", [place / "model.o"], start, "bare.ld", defines(folder, manifest))
    sections = section_bytes(elf)
    data = sum(size for name, size in sections.items() if name in (".data", ".bss"))
    flash = sum(size for name, size in sections.items() if name != ".bss")
    return Image(folder, manifest, chosen, tool.name, tool.version, command, elf, sections, flash, data)


@dataclass(frozen=True)
class CrossCompiler:
    """One C compiler for one Cortex-M core."""

    name: str
    program: tuple[str, ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()  # zig links its own compiler-rt

    @staticmethod
    def find(name: str, target: Target) -> CrossCompiler:
        """Return the compiler called "gcc", "zig" or "auto". Raises MissingExtra when it is not installed."""
        if name not in COMPILERS:
            raise KnobError(f"compiler is '{name}'; it must be one of {', '.join(COMPILERS)}")
        gcc = shutil.which("arm-none-eabi-gcc")
        if name == "gcc" or (name == "auto" and gcc):
            if not gcc:
                raise MissingExtra("'arm-none-eabi-gcc' is not installed; install it, or use compiler='zig'")
            flags = (*target.gcc_flags, "-fno-ipa-icf")
            return CrossCompiler("gcc", (gcc,), flags, ("-nostdlib", "-lgcc"))
        if importlib.util.find_spec("ziglang") is None:
            need("ziglang", extra="deploy")
        program = (sys.executable, "-m", "ziglang", "cc")
        return CrossCompiler("zig", program, (*target.zig_flags, "-fno-sanitize=all"))

    @property
    def version(self) -> str:
        """First line of the compiler's --version."""
        return tool_version((*self.program, "--version"))

    def compile(self, source: Path, output: Path, flags: Sequence[str] = ()) -> str:
        """Compile one file and return the command."""
        command = [
            *self.program,
            *self.flags,
            *WARNINGS,
            *EXACT,
            *BARE,
            *flags,
            "-c",
            str(source),
            "-o",
            str(output),
        ]
        run_tool(command)
        return " ".join(command)

    def link(
        self,
        output: Path,
        objects: Sequence[Path],
        sources: Sequence[Path],
        script: str,
        flags: Sequence[str] = (),
    ) -> Path:
        """Compile start-up `sources`, link them with `objects` by a script of runtime/; return the image."""
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            extra = []
            for source in [*sources, runtime("memory.c")]:
                extra.append(Path(scratch) / f"{source.stem}.o")
                self.compile(source, extra[-1], ("-O2", *self.no_loops_to_calls, *flags))
            fresh = Path(scratch) / output.name
            command = [*self.program, *self.flags, "-T", str(runtime(script)), "-Wl,--gc-sections"]
            run_tool([*command, *map(str, [*objects, *extra]), *self.libraries, "-o", str(fresh)])
            os.replace(fresh, output)
        return output

    @property
    def no_loops_to_calls(self) -> tuple[str, ...]:
        """Options without which a loop in memcpy could become a call of memcpy."""
        return ("-fno-builtin", *(("-fno-tree-loop-distribute-patterns",) if self.name == "gcc" else ()))


def defines(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Return the options that tell the files of runtime/ about the emitted model in `folder`."""
    name = manifest.name
    names = {"RUN": f"{name}_run", "INPUT": f"{name}_input", "OUTPUT": f"{name}_output"}
    sizes = {"INPUT_BYTES": manifest.input.size_bytes, "OUTPUT_BYTES": manifest.output.size_bytes}
    if manifest.learner is not None:
        names |= {"LEARN": f"{name}_learn", "CLASSIFY": f"{name}_classify", "NEW_CLASS": f"{name}_new_class"}
        names |= {"RESET": f"{name}_reset", "STATE": f"{name}_state"}
    values = {"MODEL_HEADER": f'"{name}.h"', **names, **sizes}
    return (f"-I{folder}", *(f"-D{key}={value}" for key, value in values.items()))


def section_bytes(elf: Path) -> dict[str, int]:
    """Return the bytes of every section of an image that takes flash or RAM, in the order of the file."""
    elffile = need("elftools.elf.elffile", extra="deploy")
    with elf.open("rb") as stream:
        sections = [s for s in elffile.ELFFile(stream).iter_sections() if s["sh_flags"] & SHF_ALLOC]
        return {s.name: int(s["sh_size"]) for s in sections if s["sh_size"]}


def run_tool(command: Sequence[str], data: bytes | None = None, cwd: Path | None = None) -> bytes:
    """Run a compiler or an emulator and return its standard output. Raises ToolError with its first lines."""
    try:
        done = subprocess.run(
            command,
            input=data,
            capture_output=True,
            timeout=TOOL_SECONDS,
            check=False,
            cwd=cwd,
            env=tool_environment(),
        )
    except subprocess.TimeoutExpired as err:
        raise ToolError(f"no answer in {TOOL_SECONDS} s from: {' '.join(command)}") from err
    except OSError as err:
        raise ToolError(f"cannot start {command[0]}: {err}") from err
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()[:12]
        raise ToolError("\n".join([f"exit status {done.returncode} from: {' '.join(command)}", *lines]))
    return done.stdout


def tool_environment() -> dict[str, str]:
    """Return the environment for tools: zig keeps its cache in our folder, messages are in English."""
    zig = str(cache_folder() / "zig")
    return {"ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig, **os.environ, "LC_ALL": "C"}


@functools.cache
def tool_version(command: tuple[str, ...]) -> str:
    """Return the first line that a command prints."""
    return run_tool(command).decode(errors="replace").splitlines()[0].strip()


def cache_folder() -> Path:
    """Return the folder for compiled things that can be made again, readable by this user only."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"thrifty-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        raise ToolError(f"'{folder}' belongs to another user; set TMPDIR to a folder of your own")
    return folder


def runtime(name: str) -> Path:
    """Return the path of a file of deploy/c/runtime."""
    return Path(str(resources.files("thrifty.deploy.c").joinpath("runtime", name)))
