"""Run a program as C on this computer, whole data sets at a time."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.build import EXACT, WARNINGS, cache_folder, defines, run_tool, runtime, tool_version
from thrifty.deploy.c.emit import render, write_files
from thrifty.deploy.c.manifest import Manifest, as_batch
from thrifty.deploy.program import Program
from thrifty.deploy.targets import target
from thrifty.errors import MissingExtra

Array = npt.NDArray[Any]

FAST = ("-O3", "-march=native")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_running = threading.Lock()  # the arena of a model is static


def run_host(
    program: Program,
    inputs: npt.ArrayLike,
    compiler: str = "cc",
    flags: Sequence[str] = FAST,
    sanitize: bool = False,
) -> Array:
    """Return what the emitted C computes on this computer for a batch: exactly what the program computes.

    inputs: (n, H, W, C) or (H, W, C) integers (reals for a float32 program). Returns (n, H, W, C) of the
    output's type.
    The compiled library is kept in the cache folder under a hash of the C, the compiler and the flags.
    sanitize: run a separate process under the address and undefined-behaviour sanitizers instead.
    Raises MissingExtra without a C compiler, ToolError when it or a sanitizer complains, DataError on
    bad inputs.
    """
    cc = shutil.which(compiler)
    if cc is None:
        raise MissingExtra(f"the C compiler '{compiler}' is not installed")
    flags = (*SANITIZED, "-DWITH_MAIN") if sanitize else (*flags, "-shared", "-fPIC")
    place = compiled(render(program, None, target("host")), cc, tuple(flags))
    manifest = Manifest.read(place)
    batch = as_batch(manifest, inputs)
    out = np.empty((len(batch), *manifest.output.shape), manifest.output.dtype)
    if sanitize:
        return np.frombuffer(run_tool([str(place / "model.bin")], batch.tobytes()), out.dtype).reshape(out.shape)
    with _running:
        _library(str(place / "model.bin")).run_batch(batch.ctypes.data, out.ctypes.data, len(batch))
    return out


def compiled(files: Mapping[str, str], cc: str, flags: tuple[str, ...], main: str = "host.c") -> Path:
    """Return a folder with rendered C and model.bin, made of it and a file of runtime/ now or earlier."""
    recipe = "\0".join(
        [tool_version((cc, "--version")), cc, _processor(), *flags, runtime(main).read_text(), *files.values()]
    )
    place = cache_folder() / "host" / hashlib.sha256(recipe.encode()).hexdigest()[:24]
    if not (place / "model.bin").exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            fresh = Path(scratch) / "c"
            write_files(fresh, files)
            manifest = Manifest.read(fresh)
            sources = [str(fresh / f"{manifest.name}.c"), str(runtime(main))]
            command = [cc, *WARNINGS, *EXACT, *flags, *defines(fresh, manifest)]
            run_tool([*command, *sources, "-o", str(fresh / "model.bin")])
            if not place.exists():
                _claim(fresh, place)
    return place


@functools.cache
def _processor() -> str:
    """Return what -march=native depends on, as far as it is easily known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _claim(fresh: Path, place: Path) -> None:
    try:
        os.replace(fresh, place)
    except OSError:  # another process was faster
        if not (place / "model.bin").exists():
            raise


@functools.lru_cache(maxsize=64)
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.run_batch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.run_batch.restype = None
    return library
