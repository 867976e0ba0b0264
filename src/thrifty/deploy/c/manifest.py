"""What model.json says about a folder of emitted C: enough to build it and to run it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.deploy.program import ITEM_BYTES, Buffer
from thrifty.errors import DataError, KnobError

Array = npt.NDArray[Any]

MANIFEST = "model.json"


@dataclass(frozen=True)
class Port:
    """The input or the output of an emitted model."""

    dtype: str
    shape: tuple[int, int, int]  # (H, W, C)
    scale: float  # real value of one unit

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return self.size * ITEM_BYTES[self.dtype]

    @staticmethod
    def of(buffer: Buffer) -> Port:
        """Return the port that a buffer of the program is."""
        return Port(buffer.dtype, buffer.shape, buffer.scale)


@dataclass(frozen=True)
class Layer:
    """One layer of the emitted C."""

    function: str  # of C; "" where nothing is to be done
    name: str  # of the call in the program
    op: str
    module: str
    macs: int


@dataclass(frozen=True)
class LearnerPort:
    """What is behind the network's output: a learner with a state of its own."""

    kind: str  # of thrifty.associative: "anchors" or "codes"
    features: int
    classes: int  # room for so many
    state_bytes: int


@dataclass(frozen=True)
class Manifest:
    """An emitted model."""

    name: str  # prefix of the file names and of the public C names
    input: Port
    output: Port
    layers: tuple[Layer, ...]
    arena_bytes: int
    constant_bytes: int
    files: tuple[str, ...]
    learner: LearnerPort | None = None

    def to_json(self) -> str:
        """Return the text of model.json."""
        content = {"generator": "thrifty", **asdict(self)}
        if self.learner is None:
            del content["learner"]
        return json.dumps(content, indent=1) + "\n"

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether emit wrote this folder."""
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("generator") == "thrifty"

    @staticmethod
    def read(folder: str | Path) -> Manifest:
        """Read it back. Raises KnobError when the folder was not written by emit."""
        if not Manifest.is_in(Path(folder)):
            raise KnobError(f"'{folder}' is no emitted model: it has no {MANIFEST} of thrifty")
        d = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        ports = {k: Port(d[k]["dtype"], tuple(d[k]["shape"]), d[k]["scale"]) for k in ("input", "output")}
        return Manifest(
            name=d["name"],
            **ports,
            layers=tuple(Layer(**layer) for layer in d["layers"]),
            arena_bytes=d["arena_bytes"],
            constant_bytes=d["constant_bytes"],
            files=tuple(d["files"]),
            learner=LearnerPort(**d["learner"]) if d.get("learner") else None,
        )


def as_batch(manifest: Manifest, inputs: npt.ArrayLike) -> Array:
    """Return inputs as an array (n, H, W, C) of the type of the input buffer.

    Raises DataError when they have another shape or do not fit the type.
    """
    port = manifest.input
    x = np.asarray(inputs)
    x = x[None] if x.shape == port.shape else x
    if x.shape[1:] != port.shape or not len(x):
        want = ", ".join(map(str, port.shape))
        raise DataError(f"inputs have shape {x.shape}; the model takes (n, {want})")
    with np.errstate(invalid="ignore"):  # NaN is caught below
        exact = x.astype(port.dtype)
    if port.dtype != "float32" and not np.array_equal(exact, x):
        raise DataError(f"inputs from {x.min()} to {x.max()} are no integers of {port.dtype}; quantise them first")
    return np.ascontiguousarray(exact)
