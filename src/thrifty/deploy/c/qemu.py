"""The second witness: the same compiled model on QEMU's emulated boards."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.c.build import CrossCompiler, Image, defines, run_tool, runtime
from thrifty.deploy.c.manifest import as_batch
from thrifty.errors import MissingExtra, ToolError

Array = npt.NDArray[Any]

QEMU = "qemu-system-arm"
OPTIONS: tuple[str, ...] = ("-nographic", "-monitor", "none", "-serial", "none")
OPTIONS += ("-semihosting-config", "enable=on,target=native")
SHIFT = 6  # an instruction takes 2^6 ns of virtual time
TICK_NS = 40  # of the counter of the MPS2 boards


@dataclass(frozen=True, eq=False)
class Witness:
    """What QEMU says about a model."""

    outputs: Array  # (n, H, W, C)
    instructions: int  # measured, of the input that took most; see `tolerance`
    instructions_each: tuple[int, ...]
    machine: str
    version: str

    tolerance = 8  # a tick is 0.6 instructions; the call itself and the two readings of the counter are included


def qemu(image: Image, inputs: npt.ArrayLike) -> Witness:
    """Run the model of `image`, linked with another start-up code, on a QEMU board. Inputs as for `emulate`.

    Raises MissingExtra when qemu-system-arm is not installed.
    """
    program = shutil.which(QEMU)
    if program is None:
        raise MissingExtra(f"'{QEMU}' is not installed; it comes with QEMU (Debian: apt install {QEMU})")
    batch, port = as_batch(image.manifest, inputs), image.manifest.output
    tool = CrossCompiler.find(image.compiler, image.target)
    machine = image.target.qemu or ""
    with tempfile.TemporaryDirectory() as folder:
        sources = [runtime("start.c"), runtime("mps2.c")]
        flags = ("-DSEMIHOSTING", *defines(image.folder, image.manifest))
        elf = tool.link(Path(folder) / "model.elf", [image.objects], sources, "mps2.ld", flags)
        (Path(folder) / "inputs").write_bytes(batch.tobytes())
        command = [program, "-M", machine, *OPTIONS, "-icount", f"shift={SHIFT}", "-kernel", str(elf)]
        run_tool(command, cwd=Path(folder))
        data = (Path(folder) / "outputs").read_bytes()
    if len(data) != len(batch) * (port.size_bytes + 4):
        raise ToolError(f"QEMU's {machine} wrote {len(data)} bytes for {len(batch)} inputs; it should be "
                        f"{len(batch) * (port.size_bytes + 4)}")  # fmt: skip
    rows = np.frombuffer(data, np.uint8).reshape(len(batch), -1)
    outputs = np.ascontiguousarray(rows[:, :-4]).view(port.dtype).reshape(len(batch), *port.shape)
    ticks = np.ascontiguousarray(rows[:, -4:]).view("<u4")[:, 0]
    each = tuple(round(int(t) * TICK_NS / 2**SHIFT) for t in ticks)
    version = run_tool([program, "--version"]).decode().splitlines()[0]
    return Witness(outputs, max(each), each, machine, version)
