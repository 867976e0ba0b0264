"""From a graph or a program to a proven C project: `deploy` is the one call. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thrifty.budget import format_bytes
from thrifty.cost import Cost
from thrifty.errors import DataError, KnobError, MissingExtra, StoreError, need
from thrifty.graph import Graph
from thrifty.report import Layer, Memory, Parity

if TYPE_CHECKING:
    from thrifty.deploy.c.build import Image
    from thrifty.deploy.c.emulate import Emulation
    from thrifty.deploy.program import Program
    from thrifty.deploy.targets import Target

Array = npt.NDArray[Any]

__all__ = ["Deployment", "compiler_version", "deploy", "measure", "refuse_missing_tools", "rehearse"]


@dataclass(frozen=True)
class Deployment:
    """A C project and what was measured on it.

    `parity` says how many samples each engine ran and on how many its bytes differed from the program's.
    """

    program: Program
    target: str
    folder: Path | None  # the C project; None for a rehearsal
    cost: Cost  # flash, RAM and instructions measured; params, weight bytes and MACs counted
    memory: Memory  # the plan of the arena
    parity: Parity
    layer_instructions: Mapping[str, int] = field(default_factory=dict)  # name of the call -> instructions
    stack_bytes: int | None = None  # high-water mark in the emulator
    image: Image | None = None  # None for the host

    @property
    def flash_bytes(self) -> int | None:
        """Code and constants of the linked image; None for the host."""
        return self.cost.flash_bytes

    @property
    def ram_bytes(self) -> int | None:
        """Arena, other data and stack."""
        return self.cost.ram_bytes

    @property
    def instructions(self) -> int | None:
        """Executed instructions of one inference; None for the host."""
        return self.cost.instructions

    @property
    def proven(self) -> bool:
        """Whether every engine gave every byte of the program's outputs."""
        return self.parity.clean

    def layers(self, fidelity: Mapping[str, tuple[float | None, float]] | None = None) -> tuple[Layer, ...]:
        """Return the rows of the per-layer table; `fidelity` as deploy.fidelity.layer_fidelity returns it."""
        known = fidelity or {}
        return tuple(
            Layer(
                name=call.name,
                module=call.module,
                op=call.op,
                shape=_channels_first(self.program.buffers[call.output].shape),
                macs=call.macs,
                weight_bytes=replace(self.program, calls=(call,)).constant_bytes,
                instructions=self.layer_instructions.get(call.name),
                error_db=known.get(call.name, (None, 0.0))[0],
                saturated=known[call.name][1] if call.name in known else None,
            )
            for call in self.program.calls
        )


def deploy(
    model: Graph | Program,
    folder: str | Path,
    target: str = "cortex-m4",
    samples: npt.ArrayLike | None = None,
    vectors: int = 8,
    name: str = "model",
) -> Deployment:
    """Write a C project, build it for the target, run it there, and compare every byte with the program.

    model: a program, or a graph as `capture` makes it (quantised, or of float32), which is lowered first.
    samples: real inputs in PyTorch's layout (n, ...); None = random integers over the whole input range.
    The program, the host's C and the emulated target run all `vectors` first ones, which become the self-
    test; the host's C runs all. name: prefix of the C names, when a graph is given. Nothing is left in
    `folder` unless everything was built and fits the memory of the target. Raises UnsupportedModel listing
    everything that cannot be deployed, KnobError when the target is too small or unknown, MissingExtra
    without a compiler or emulator, ToolError when one fails, StoreError on a full disk.
    """
    from thrifty.deploy.c.emit import emit

    chosen, program = _target(target), _program(model, name)
    stored = _inputs(program, samples, vectors)
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".thrifty-", dir=folder.parent) as place:
            made = _made(program, chosen, Path(place) / "c", stored, vectors)
            emit(program, folder, (stored[:vectors], made.expected[:vectors]), chosen)
            made = _kept(made, folder)
    except OSError as err:
        raise StoreError(f"the C project cannot be written to {folder}: {err.strerror or err}") from err
    return _deployment(program, chosen, folder, made)


def rehearse(
    model: Graph | Program,
    target: str = "cortex-m4",
    samples: npt.ArrayLike | None = None,
    vectors: int = 8,
    name: str = "model",
) -> Deployment:
    """Do all that `deploy` does, in a temporary folder that is gone afterwards: `folder` and `image` are None."""
    chosen, program = _target(target), _program(model, name)
    stored = _inputs(program, samples, vectors)
    with tempfile.TemporaryDirectory(prefix="thrifty-") as place:
        made = _made(program, chosen, Path(place) / "c", stored, vectors)
    return replace(_deployment(program, chosen, None, made), image=None)


def refuse_missing_tools(target: str | Target) -> None:
    """Raise MissingExtra when the compiler or the emulator for a target is not installed."""
    from thrifty.deploy.c.build import CrossCompiler

    chosen = _target(target)
    if chosen.core != "host":
        CrossCompiler.find("auto", chosen)
        need("unicorn", extra="deploy")
        need("elftools.elf.elffile", extra="deploy")


def compiler_version(target: str | Target) -> str | None:
    """Return which compiler flash and instructions on a target belong to (they differ); None for the host."""
    from thrifty.deploy.c.build import CrossCompiler

    chosen = _target(target)
    return None if chosen.core == "host" else CrossCompiler.find("auto", chosen).version


def measure(program: Program, target: str = "cortex-m4") -> Cost:
    """Return the cost of a program on a target, built and emulated on one random input in a temporary folder.

    Flash, RAM and instructions are measured; for the host only the RAM of the arena is known.
    """
    with tempfile.TemporaryDirectory(prefix="thrifty-") as place:
        image, emulation = _built(program, _target(target), Path(place) / "c", _inputs(program, None, 1), None)
        return _cost(program, image, emulation)


def _deployment(program: Program, target: Target, folder: Path | None, made: _Made) -> Deployment:
    return Deployment(
        program=program,
        target=target.name,
        folder=folder,
        cost=made.cost,
        memory=made.memory,
        parity=made.parity,
        layer_instructions=made.emulation.per_layer if made.emulation else {},
        stack_bytes=made.emulation.stack_bytes if made.emulation else None,
        image=made.image,
    )


@dataclass(frozen=True)
class _Made:
    expected: Array
    cost: Cost
    memory: Memory
    parity: Parity
    image: Image | None
    emulation: Emulation | None


def _target(name: str | Target) -> Target:
    from thrifty.deploy.targets import target

    return target(name)


def _program(model: Graph | Program, name: str) -> Program:
    from thrifty.deploy.lower import lower

    return lower(model, name) if isinstance(model, Graph) else model


def _inputs(program: Program, samples: npt.ArrayLike | None, vectors: int) -> Array:
    """Return inputs in buffer layout (n, H, W, C): quantised samples, or random ones with both ends of the range."""
    from thrifty.deploy.run import quantize_input

    if vectors < 1:
        raise KnobError(f"deploy needs at least one test vector, not {vectors}")
    if samples is not None:
        real = np.asarray(samples, dtype=np.float32)
        if not len(real):
            raise DataError("deploy got no samples: give at least one, or None for random ones")
        if not np.isfinite(real).all():
            raise DataError("deploy got samples with NaN or infinity")
        return np.asarray(quantize_input(program, real))
    port, rng = program.buffers[program.input], np.random.default_rng(0)
    if port.dtype == "float32":
        return rng.standard_normal((vectors, *port.shape)).astype(np.float32)
    info = np.iinfo(port.dtype)
    x = rng.integers(info.min, info.max + 1, (vectors, *port.shape))
    if vectors > 2:
        x[1], x[2] = info.min, info.max
    return x.astype(port.dtype)


def _made(program: Program, target: Target, place: Path, stored: Array, vectors: int) -> _Made:
    from thrifty.deploy.plan import plan
    from thrifty.deploy.run import run

    refuse_small(target, program.constant_bytes, plan(program).bound_bytes)
    expected = run(program, stored[:vectors])
    image, emulation = _built(program, target, place, stored[:vectors], expected)
    cost = _cost(program, image, emulation)
    refuse_small(target, cost.flash_bytes or 0, cost.ram_bytes or 0)
    samples, mismatches = {"program": len(expected)}, {}
    host = _host_outputs(program, stored)
    if host is not None:
        if len(stored) > len(expected):
            expected = np.concatenate([expected, run(program, stored[vectors:])])
            samples["program"] = len(expected)
        samples["host C"], mismatches["host C"] = len(stored), _differing(host, expected)
    if emulation is not None:
        engine = f"{target.core} (emulated)"
        samples[engine] = len(emulation.outputs)
        mismatches[engine] = _differing(emulation.outputs, expected[: len(emulation.outputs)])
    memory = Memory.from_plan(_emitted_plan(program), program)
    return _Made(expected, cost, memory, Parity(samples, mismatches), image, emulation)


def _built(
    program: Program, target: Target, place: Path, stored: Array, expected: Array | None
) -> tuple[Image | None, Emulation | None]:
    from thrifty.deploy.c.build import build
    from thrifty.deploy.c.emit import emit
    from thrifty.deploy.c.emulate import emulate

    emit(program, place, None if expected is None else (stored, expected), target)
    if target.core == "host":
        return None, None
    image = build(place, target)
    return image, emulate(image, stored)


def _cost(program: Program, image: Image | None, emulation: Emulation | None) -> Cost:
    stored = {id(v): v.size for c in program.calls for k, v in c.constants.items() if k in ("weight", "bias")}
    params = sum(stored.values())  # equal constants are one object
    counted = Cost(params=params, weight_bytes=program.constant_bytes, macs=program.macs)
    if image is None or emulation is None:
        return replace(counted, ram_bytes=_emitted_plan(program).arena_bytes)
    return replace(
        counted,
        flash_bytes=image.flash_bytes,
        ram_bytes=emulation.ram_bytes,
        instructions=emulation.instructions,
    )


def _emitted_plan(program: Program) -> Any:
    from thrifty.deploy.ops import OPS
    from thrifty.deploy.plan import plan

    calls = {call.name: OPS[call.op].c(call, program).scratch_bytes for call in program.calls}
    return plan(program, {name: size for name, size in calls.items() if size})


def _host_outputs(program: Program, stored: Array) -> Array | None:
    from thrifty.deploy.c.host import run_host

    try:
        return run_host(program, stored)
    except MissingExtra:
        return None


def _differing(got: Array, expected: Array) -> int:
    """Return the number of samples of which any byte differs."""
    return int((got != expected).reshape(len(expected), -1).any(axis=1).sum())


def refuse_small(target: Target, flash_bytes: int, ram_bytes: int) -> None:
    """Raise KnobError when a target has less flash or RAM than is needed."""
    short = [
        f"{what} {format_bytes(need)} of {format_bytes(has)}"
        for what, need, has in (
            ("flash", flash_bytes, target.flash_bytes),
            ("RAM", ram_bytes, target.ram_bytes),
        )
        if has is not None and need > has
    ]
    if short:
        raise KnobError(f"the model does not fit {target.title} ('{target.name}'): it needs {', '.join(short)}")


def _kept(made: _Made, folder: Path) -> _Made:
    """Keep the built image in the cache, under a hash of its bytes: the project holds sources only."""
    if made.image is None:
        return made
    from thrifty.deploy.c.build import cache_folder

    built = made.image.elf
    place = cache_folder() / "images" / hashlib.sha256(built.read_bytes()).hexdigest()[:20]
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as fresh:
            shutil.copytree(built.parent, Path(fresh) / "image")
            try:
                (Path(fresh) / "image").rename(place)
            except OSError:
                if not place.exists():  # else another process was first
                    raise
    return replace(made, image=replace(made.image, folder=folder, elf=place / built.name))


def _channels_first(shape: tuple[int, int, int]) -> tuple[int, ...]:
    h, w, c = shape
    return (c,) if h == w == 1 else (c, w) if h == 1 else (c, h, w)
