"""Write a program as a folder of readable, deterministic C99: the model, the kernels it needs, a self-test, a Makefile."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

import thrifty
from thrifty import arith
from thrifty.deploy.c.ccall import Array, CArray, CCall, CStruct, CText
from thrifty.deploy.c.text import CTYPES, c_array, c_float, c_name, c_names, comment, power_or_number
from thrifty.deploy.ops import OPS
from thrifty.deploy.plan import plan as make_plan
from thrifty.deploy.program import Buffer, Call, Plan, Program
from thrifty.deploy.targets import Target
from thrifty.deploy.targets import target as find_target
from thrifty.errors import DataError, KnobError

MANIFEST = "model.json"
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
DEFINED = re.compile(r"^static const \w+ (\w+)", re.MULTILINE)
RUNTIME = ("start.c", "memory.c", "mps2.ld")  # copied beside the model, for `make qemu`


@dataclass(frozen=True)
class Vectors:
    """Test vectors of the self-test: inputs (n, H, W, C) and the outputs (n, H, W, C) expected for them."""

    inputs: Array
    outputs: Array


def emit(
    program: Program,
    folder: str | Path,
    vectors: Vectors | tuple[Array, Array] | None = None,
    target: str | Target = "cortex-m4",
    plan: Plan | None = None,
) -> Path:
    """Write `program` as C into `folder` and return the folder. The same program gives the same bytes.

    The folder gets <name>.h, <name>.c, kernels/, main.c (self-test), Makefile, README.md, runtime/ (start-up code for
    `make qemu`) and model.json (see Manifest). An earlier emission there is replaced; other files are kept.
    vectors: inputs and expected outputs in buffer layout, integers; target: what the Makefile compiles for;
    plan: another arena plan than deploy.plan's.
    Raises KnobError when a file that thrifty did not write would be overwritten, DataError on constants or vectors
    that C cannot hold.
    """
    folder = Path(folder)
    files = render(program, vectors, find_target(target), plan)
    _refuse_strangers(folder, files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        write_files(fresh, files)
        _move_in(fresh, folder, files)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def render(
    program: Program, vectors: Vectors | tuple[Array, Array] | None, target: Target, plan: Plan | None = None
) -> dict[str, str]:
    """Return the files of an emission, path -> text, without writing anything."""
    calls = [OPS[call.op].c(call, program) for call in program.calls]
    scratch = {call.name: c.scratch_bytes for call, c in zip(program.calls, calls) if c.scratch_bytes}
    plan = plan or make_plan(program, scratch)
    headers = _headers(sorted({h for c in calls for h in c.headers}))
    prefix = c_name(program.name)
    words = _Words(program, calls, plan, prefix, taken={i for text in headers.values() for i in _identifiers(text)})
    values = {
        "name": comment(program.name), "version": thrifty.__version__, "prefix": prefix, "macro": prefix.upper(),
        "input": words.port(program.input), "output": words.port(program.output), "classes": program.classes,
        "plan": plan, "macs": program.macs, "constant_bytes": words.constant_bytes, "headers": list(headers),
        "arena": words.arena, "buffers": words.buffers(), "layers": words.layers(), "target": target,
        "vectors": _vectors(program, vectors),
    }  # fmt: skip
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    files = {
        out: jinja.from_string(_read("templates", f"{template}.j2")).render(values)
        for out, template in (
            (f"{prefix}.h", "model.h"), (f"{prefix}.c", "model.c"), ("main.c", "main.c"),
            ("Makefile", "Makefile"), ("README.md", "README.md"),
        )  # fmt: skip
    }
    files |= {f"kernels/{name}": text for name, text in headers.items()}
    files |= {f"runtime/{name}": _read("runtime", name) for name in RUNTIME}
    files[MANIFEST] = _manifest(program, words, plan, [*files, MANIFEST])
    return files


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write rendered files, path -> text, under a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Port:
    """The input or the output of an emitted model."""

    dtype: str
    shape: tuple[int, int, int]  # (H, W, C)
    scale: float

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Manifest:
    """What model.json says about an emitted folder: enough to build it and to run it."""

    name: str  # prefix of the file names and of the public C names
    input: Port
    output: Port
    layers: tuple[tuple[str, str, str], ...]  # (C function, name of the call, operator)
    arena_bytes: int
    constant_bytes: int
    files: tuple[str, ...]

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read it back. Raises KnobError when the folder was not written by emit."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise KnobError(f"'{folder}' is no emitted model: it has no {MANIFEST}")
        d = json.loads(path.read_text(encoding="utf-8"))
        ports = {k: Port(d[k]["dtype"], tuple(d[k]["shape"]), d[k]["scale"]) for k in ("input", "output")}
        layers = tuple((layer["function"], layer["name"], layer["op"]) for layer in d["layers"])
        return Manifest(d["name"], ports["input"], ports["output"], layers, d["arena_bytes"], d["constant_bytes"],
                        tuple(d["files"]))  # fmt: skip


def as_batch(manifest: Manifest, inputs: npt.ArrayLike) -> Array:
    """Return inputs as an array (n, H, W, C) of the type of the input buffer. Raises DataError when they do not fit."""
    port = manifest.input
    x = np.asarray(inputs)
    x = x[None] if x.shape == port.shape else x
    if x.shape[1:] != port.shape or not len(x):
        raise DataError(f"inputs have shape {x.shape}; the model takes (n, {', '.join(map(str, port.shape))})")
    exact = x.astype(port.dtype)
    if port.dtype != "float32" and not np.array_equal(exact, x):
        raise DataError(f"inputs do not fit {port.dtype}: they range from {x.min()} to {x.max()}, or are no integers")
    return np.ascontiguousarray(exact)


class _Words:
    """The C identifiers of a program and the pieces of text made with them."""

    def __init__(self, program: Program, calls: list[CCall], plan: Plan, prefix: str, taken: set[str]) -> None:
        self.program, self.calls, self.plan = program, calls, plan
        ends = ("input", "output", "run", "predict", "quantize_input", "input_t", "output_t")
        self.taken = taken | {f"{prefix}_{end}" for end in ends}
        self.arena = self._name("arena")
        self.of_buffer = {name: self._name(name) for name in program.buffers}
        self.functions = [self._name(f"layer_{call.name}") for call in program.calls]
        self._defined: dict[str, str] = {}  # definition -> its name
        self.constant_bytes = 0  # of the constants as packed; equal ones are there once
        self.definitions: list[list[str]] = []
        self.places = [self._define(call, c) for call, c in zip(program.calls, calls)]

    def _name(self, wanted: str) -> str:
        name = c_names([wanted], self.taken)[0]
        self.taken.add(name)
        return name

    def _define(self, call: Call, c: CCall) -> dict[str, str]:
        """Write the definitions of the constants of a call and return key -> C name."""
        places, texts = {}, []
        for key, constant in (c.constants or {}).items():
            same = constant.define("NAME")
            if same not in self._defined:
                name, text = self._definition(f"{call.name}_{key}", constant)
                self._defined[same] = name
                self.constant_bytes += constant.size_bytes
                texts.append(text)
            places[key] = self._defined[same]
        self.definitions.append(texts)
        return places

    def _definition(self, wanted: str, constant: CArray | CStruct | CText) -> tuple[str, str]:
        """Return a name and the text of a definition; no name that the text defines is in use."""
        while True:
            name = self._name(wanted)
            text = constant.define(name)
            others = set(DEFINED.findall(text)) - {name}
            if not others & self.taken:
                self.taken |= others
                return name, text

    def port(self, name: str) -> dict[str, Any]:
        b = self.program.buffers[name]
        low, high = LIMITS.get(b.dtype, (0, 0))
        return {
            "ctype": CTYPES[b.dtype], "shape": b.shape, "size": b.size, "words": _describe(b), "scale": c_float(b.scale),
            "reciprocal": c_float(float(arith.reciprocal(b.scale))), "offset": self.plan.offsets[name],
            "low": low, "high": high, "quantized": b.dtype in LIMITS,
        }  # fmt: skip

    def buffers(self) -> list[dict[str, Any]]:
        return [
            {"name": self.of_buffer[name], "ctype": CTYPES[b.dtype], "offset": self.plan.offsets[name],
             "words": _describe(b), "life": self.plan.lives[name]}
            for name, b in self.program.buffers.items()
        ]  # fmt: skip

    def layers(self) -> list[dict[str, Any]]:
        return [self._layer(i, call, c) for i, (call, c) in enumerate(zip(self.program.calls, self.calls))]

    def _layer(self, index: int, call: Call, c: CCall) -> dict[str, Any]:
        buffers = self.program.buffers
        return {
            "op": call.op, "module": comment(call.module), "macs": call.macs, "note": comment(c.note),
            "inputs": [f"{self.of_buffer[x]}: {_describe(buffers[x])}" for x in call.inputs],
            "output": f"{self.of_buffer[call.output]}: {_describe(buffers[call.output])}",
            "definitions": self.definitions[index], "function": self.functions[index],
            "text": textwrap.indent(textwrap.dedent(self._statements(index, call, c)).strip("\n"), "    "),
        }  # fmt: skip

    def _statements(self, index: int, call: Call, c: CCall) -> str:
        inputs = [self.of_buffer[x] for x in call.inputs]
        places = {f"x{i}": name for i, name in enumerate(inputs)} | self.places[index]
        places |= {"x": inputs[0], "y": self.of_buffer[call.output], "scratch": "0"}
        if c.scratch_bytes:
            places["scratch"] = f"({self.arena}.bytes + {self.plan.offsets[call.name]})"
        return string.Template(c.text).substitute(places)


def _describe(b: Buffer) -> str:
    shape = f"({b.shape[0]}, {b.shape[1]}, {b.shape[2]})"
    return f"{b.dtype} {shape}" + ("" if b.dtype in ("float32", "int32") else f", scale {power_or_number(b.scale)}")


def _vectors(program: Program, vectors: Vectors | tuple[Array, Array] | None) -> dict[str, Any] | None:
    if vectors is None:
        return None
    x, y = vectors if isinstance(vectors, tuple) else (vectors.inputs, vectors.outputs)
    arrays = {}
    for word, name, values in (("inputs", program.input, np.asarray(x)), ("outputs", program.output, np.asarray(y))):
        b = program.buffers[name]
        if values.ndim != 4 or values.shape[1:] != b.shape or len(values) != len(x) or not len(values):
            raise DataError(f"test {word} have shape {values.shape}; they must be (n, {', '.join(map(str, b.shape))})")
        exact = values.astype(b.dtype)
        if not np.array_equal(exact, values):
            raise DataError(f"test {word} do not fit {b.dtype}; give them as the integers of buffer '{name}'")
        arrays[word] = c_array(f"test_{word}", exact, CTYPES[b.dtype])
    return {"count": len(x), **arrays}


def _manifest(program: Program, words: _Words, plan: Plan, files: list[str]) -> str:
    def port(name: str) -> dict[str, Any]:
        b = program.buffers[name]
        return {"dtype": b.dtype, "shape": list(b.shape), "scale": b.scale}

    layers = [
        {"function": f, "name": call.name, "op": call.op, "module": call.module, "macs": call.macs}
        for f, call in zip(words.functions, program.calls)
    ]
    content = {
        "generator": "thrifty", "name": c_name(program.name), "input": port(program.input),
        "output": port(program.output), "arena_bytes": plan.arena_bytes, "constant_bytes": words.constant_bytes,
        "layers": layers, "files": sorted(files),
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"


def _folder(*parts: str) -> Traversable:
    return resources.files("thrifty.deploy.c").joinpath(*parts)


def _read(*parts: str) -> str:
    return _folder(*parts).read_text(encoding="utf-8")


def _headers(names: list[str]) -> dict[str, str]:
    """Return the kernel headers and those that they include, name -> text, sorted by name."""
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = _read("kernels", name)
            todo += re.findall(r'^\s*#\s*include\s+"([^"]+)"', found[name], flags=re.MULTILINE)
    return dict(sorted(found.items()))


def _identifiers(text: str) -> set[str]:
    """Return what a kernel header may define at file scope: all of it starts with thrifty_ or THRIFTY_."""
    return set(re.findall(r"\b[Tt][Hh][Rr][Ii][Ff][Tt][Yy]_\w+", text))


def _refuse_strangers(folder: Path, files: Mapping[str, str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise KnobError(f"'{folder}' is a file; the emitted C needs a folder")
    if not (folder / MANIFEST).is_file():
        strangers = sorted(name for name in files if (folder / name).exists())
        if strangers:
            raise KnobError(f"'{folder}' has {', '.join(strangers)} already, not written by thrifty; choose another folder")


def _move_in(fresh: Path, folder: Path, files: Mapping[str, str]) -> None:
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = Manifest.read(folder).files if (folder / MANIFEST).is_file() else ()
    for name in [n for n in files if n != MANIFEST] + [MANIFEST]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, folder / name)
    for name in sorted(set(old) - set(files)):
        (folder / name).unlink(missing_ok=True)
