"""Write a program as a folder of readable, deterministic C99: model, kernels, self-test, Makefile."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import jinja2

import thrifty
from thrifty.deploy.c.ccall import Array
from thrifty.deploy.c.manifest import MANIFEST, Layer, LearnerPort, Manifest, Port
from thrifty.deploy.c.text import c_name, comment
from thrifty.deploy.c.words import Words, test_vectors
from thrifty.deploy.ops import OPS
from thrifty.deploy.plan import beside
from thrifty.deploy.plan import plan as make_plan
from thrifty.deploy.program import Plan, Program
from thrifty.deploy.targets import Target
from thrifty.deploy.targets import target as find_target
from thrifty.errors import KnobError

TEMPLATES = {
    "{}.h": "model.h",
    "{}.c": "model.c",
    "main.c": "main.c",
    "Makefile": "Makefile",
    "README.md": "README.md",
}
RUNTIME = ("start.c", "memory.c", "mps2.ld")  # copied beside the model, for `make qemu`


class Addition(Protocol):
    """C behind a network, in the same file: deploy/c/learner.py."""

    @property
    def headers(self) -> tuple[str, ...]:
        """Kernel headers to include."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Memory beside the output, in the arena, that lives during one call only."""
        ...

    @property
    def port(self) -> LearnerPort:
        """What model.json says about it."""
        ...

    def texts(self, values: Mapping[str, Any], scratch: str) -> Mapping[str, str]:
        """Return the text for "header", "source" and "main" (the self-test), and "readme".

        values: those of the templates; scratch: a C expression, the address of the scratch memory.
        """
        ...


def emit(
    program: Program,
    folder: str | Path,
    vectors: tuple[Array, Array] | None = None,
    target: str | Target = "cortex-m4",
    plan: Plan | None = None,
    addition: Addition | None = None,
) -> Path:
    """Write `program` as C into `folder` and return the folder. The same program gives the same bytes.

    The folder gets <name>.h, <name>.c, kernels/, main.c (self-test), Makefile, README.md, runtime/ (start-up
    code for `make qemu`) and model.json (see Manifest). An earlier emission is replaced; other files stay.
    vectors: inputs (n, H, W, C) and the outputs expected for them, as stored in the buffers; target: what the
    Makefile compiles for; plan: another arena plan than deploy.plan's; addition: C behind the network.
    Raises KnobError when a file that thrifty did not write would be overwritten, DataError on constants or
    vectors that C cannot hold.
    """
    folder = Path(folder)
    files = render(program, vectors, find_target(target), plan, addition)
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
    program: Program,
    vectors: tuple[Array, Array] | None,
    target: Target,
    plan: Plan | None = None,
    addition: Addition | None = None,
) -> dict[str, str]:
    """Return the files of an emission, path -> text; nothing is written. Arguments and raises as `emit`."""
    calls = [OPS[call.op].c(call, program) for call in program.calls]
    plan = plan or make_plan(
        program, {k.name: c.scratch_bytes for k, c in zip(program.calls, calls) if c.scratch_bytes}
    )
    scratch = 0
    if addition is not None:
        plan, scratch = beside(program, plan, addition.scratch_bytes)
    wanted = [header for c in calls for header in c.headers] + list(addition.headers if addition else ())
    included = sorted(set(wanted))
    headers = _headers(included)
    prefix = c_name(program.name)
    words = Words(program, calls, plan, prefix, {i for text in headers.values() for i in _identifiers(text)})
    values = {
        "name": comment(program.name),
        "version": thrifty.__version__,
        "prefix": prefix,
        "macro": prefix.upper(),
        "input": words.port(program.input),
        "output": words.port(program.output),
        "classes": program.classes,
        "plan": plan,
        "macs": program.macs,
        "constant_bytes": words.constant_bytes,
        "headers": included,
        "instances": list(dict.fromkeys(i for c in calls for i in c.instances)),
        "arena": words.arena,
        "buffers": words.buffers(),
        "layers": words.layers(),
        "target": target if target.core != "host" else find_target("cortex-m4"),
        "vectors": None if vectors is None else test_vectors(program, *vectors),
    }
    address = f"({words.arena}.bytes + {scratch})"
    values["addition"] = None if addition is None else addition.texts(values, address)
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    files = {
        name.format(prefix): jinja.from_string(_read("templates", f"{template}.j2")).render(values)
        for name, template in TEMPLATES.items()
    }
    files |= {f"kernels/{name}": text for name, text in headers.items()}
    files |= {f"runtime/{name}": _read("runtime", name) for name in RUNTIME}
    return files | {MANIFEST: _manifest(words, [*files, MANIFEST], addition).to_json()}


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write rendered files, path -> text, under a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def _manifest(words: Words, files: Sequence[str], addition: Addition | None) -> Manifest:
    program = words.program
    layers = tuple(
        Layer(function, call.name, call.op, call.module, call.macs)
        for function, call in zip(words.functions, program.calls)
    )
    return Manifest(
        name=c_name(program.name),
        input=Port.of(program.buffers[program.input]),
        output=Port.of(program.buffers[program.output]),
        layers=layers,
        arena_bytes=words.plan.arena_bytes,
        constant_bytes=words.constant_bytes,
        files=tuple(sorted(files)),
        learner=None if addition is None else addition.port,
    )


def _read(*parts: str) -> str:
    return resources.files("thrifty.deploy.c").joinpath(*parts).read_text(encoding="utf-8")


def _headers(names: Sequence[str]) -> dict[str, str]:
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
    return set(re.findall(r"\b(?:thrifty|THRIFTY)_\w+", text))


def _refuse_strangers(folder: Path, files: Mapping[str, str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise KnobError(f"'{folder}' is a file; the emitted C needs a folder")
    if not Manifest.is_in(folder):
        strangers = ", ".join(sorted(name for name in files if (folder / name).exists()))
        if strangers:
            raise KnobError(f"'{folder}' has {strangers} already, not written by thrifty; choose another folder")


def _move_in(fresh: Path, folder: Path, files: Mapping[str, str]) -> None:
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = Manifest.read(folder).files if Manifest.is_in(folder) else ()
    for name in [n for n in files if n != MANIFEST] + [MANIFEST]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, folder / name)
    for name in set(old) - set(files):
        path = PurePosixPath(name)
        if not path.is_absolute() and ".." not in path.parts:
            (folder / path).unlink(missing_ok=True)
