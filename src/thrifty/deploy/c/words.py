"""The C identifiers of a program and the pieces of text made with them: what the templates print."""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from thrifty import arith
from thrifty.deploy.c.ccall import Array, CCall, Constant
from thrifty.deploy.c.text import CTYPES, c_array, c_float, c_names, comment, power_or_number
from thrifty.deploy.program import Buffer, Call, Plan, Program
from thrifty.errors import DataError

LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
DEFINED = re.compile(r"^static const \w+ (\w+)", re.MULTILINE)
PUBLIC: tuple[str, ...] = ("input", "output", "run", "predict", "quantize_input", "input_t", "output_t")
PUBLIC += (
    "learn",
    "classify",
    "vote",
    "clear_votes",
    "winner",
    "new_class",
    "reset",
)  # of a learner behind the network
PUBLIC += ("state", "state_t", "ballot", "ballot_t", "learner", "codebook")
PUBLIC += ("prepare", "distance", "encode", "learn_anchor", "move", "vote_anchors")
MACROS: tuple[str, ...] = (
    "INPUT_HEIGHT",
    "INPUT_WIDTH",
    "INPUT_CHANNELS",
    "INPUT_SIZE",
    "INPUT_SCALE",
    "OUTPUT_SIZE",
)
MACROS += ("OUTPUT_SCALE", "CLASSES", "ARENA_BYTES", "CONSTANT_BYTES", "WITH_FLOAT_INPUT", "LAYER", "KEEP", "H")
MACROS += ("LEARNER_CLASSES", "LEARNER_FEATURES", "STATE_BYTES")


class Words:
    """Names for everything in <prefix>.c, all different, and the text of its layers.

    Attributes:
        arena: name of the arena.
        functions: name of the function of each call, "" where nothing is to be done.
        constant_bytes: bytes of the constants as packed; equal ones are there once.
    """

    def __init__(self, program: Program, calls: Sequence[CCall], plan: Plan, prefix: str, taken: set[str]) -> None:
        """taken: identifiers that the kernels define."""
        self.program, self.calls, self.plan = program, calls, plan
        public = {f"{prefix}_{end}" for end in PUBLIC} | {f"{prefix.upper()}_{end}" for end in MACROS}
        self.taken = taken | public
        self.arena = self._name("arena")
        self.of_buffer = {name: self._name(name) for name in program.buffers}
        self.functions = [self._function(call, c) for call, c in zip(program.calls, calls)]
        self.constant_bytes = 0
        self._defined: dict[str, str] = {}  # definition -> its name
        self._definitions: list[list[str]] = []  # of each call, those that are new
        self._places = [self._define(call, c) for call, c in zip(program.calls, calls)]

    def port(self, name: str) -> dict[str, Any]:
        """Return what the header says about the input or the output."""
        b = self.program.buffers[name]
        low, high = LIMITS.get(b.dtype, (0, 0))
        return {
            "ctype": CTYPES[b.dtype],
            "shape": b.shape,
            "size": b.size,
            "words": describe(b),
            "scale": c_float(b.scale),
            "reciprocal": c_float(float(arith.reciprocal(b.scale))),
            "offset": self.plan.offsets[name],
            "low": low,
            "high": high,
            "quantized": b.dtype in LIMITS,
        }

    def buffers(self) -> list[dict[str, Any]]:
        """Return the buffers that some layer reads or writes."""
        used = {b for f, call in zip(self.functions, self.program.calls) if f for b in (*call.inputs, call.output)}
        return [
            {
                "name": self.of_buffer[name],
                "ctype": CTYPES[b.dtype],
                "offset": self.plan.offsets[name],
                "words": describe(b),
                "life": self.plan.lives[name],
            }
            for name, b in self.program.buffers.items()
            if name in used
        ]

    def layers(self) -> list[dict[str, Any]]:
        """Return the comment, the constants, the function and its statements for each call."""
        return [self._layer(i, call, c) for i, (call, c) in enumerate(zip(self.program.calls, self.calls))]

    def _layer(self, index: int, call: Call, c: CCall) -> dict[str, Any]:
        buffers = self.program.buffers
        text = textwrap.dedent(self._statements(index, call, c)).strip("\n")
        return {
            "op": call.op,
            "module": comment(call.module),
            "macs": call.macs,
            "note": comment(c.note),
            "inputs": [f"{self.of_buffer[x]}: {describe(buffers[x])}" for x in call.inputs],
            "output": f"{self.of_buffer[call.output]}: {describe(buffers[call.output])}",
            "definitions": self._definitions[index],
            "function": self.functions[index],
            "text": textwrap.indent(text, "    "),
        }

    def _statements(self, index: int, call: Call, c: CCall) -> str:
        inputs = [self.of_buffer[x] for x in call.inputs]
        places = {f"x{i}": name for i, name in enumerate(inputs)} | self._places[index]
        places |= {"x": inputs[0], "y": self.of_buffer[call.output], "scratch": "0"}
        if c.scratch_bytes:
            places["scratch"] = f"({self.arena}.bytes + {self.plan.offsets[call.name]})"
        return string.Template(c.text).substitute(places)

    def _name(self, wanted: str) -> str:
        name = c_names([wanted], self.taken)[0]
        self.taken.add(name)
        return name

    def _function(self, call: Call, c: CCall) -> str:
        offsets = self.plan.offsets
        nothing = c.free_in_place and offsets[call.inputs[0]] == offsets[call.output]
        return "" if nothing else self._name(f"layer_{call.name}")

    def _define(self, call: Call, c: CCall) -> dict[str, str]:
        """Write the definitions of the constants of a call that are new, and return key -> C name for all."""
        places, texts = {}, []
        for key, constant in (c.constants or {}).items():
            same = constant.define("NAME")
            if same not in self._defined:
                name, text = self._definition(f"{call.name}_{key}", constant)
                self._defined[same] = name
                self.constant_bytes += constant.size_bytes
                texts.append(text)
            places[key] = self._defined[same]
        self._definitions.append(texts)
        return places

    def _definition(self, wanted: str, constant: Constant) -> tuple[str, str]:
        """Return a name and the text of a definition; no name that the text defines is in use."""
        while True:
            name = self._name(wanted)
            text = constant.define(name)
            others = set(DEFINED.findall(text)) - {name}
            if not others & self.taken:
                self.taken |= others
                return name, text


def describe(b: Buffer) -> str:
    """Return a buffer in words.

    >>> describe(Buffer("x", (28, 28, 1), "int8", 0.0625))
    'int8 (28, 28, 1), scale 2^-4'
    """
    shape = f"{b.dtype} ({b.shape[0]}, {b.shape[1]}, {b.shape[2]})"
    return shape if b.dtype in ("float32", "int32") else f"{shape}, scale {power_or_number(b.scale)}"


def test_vectors(program: Program, inputs: Array, outputs: Array) -> Mapping[str, Any]:
    """Return the definitions of the self-test's arrays.

    inputs, outputs: (n, H, W, C). Raises DataError when they have another shape or do not fit the types.
    """
    found: dict[str, Any] = {"count": len(inputs)}
    for word, name, given in (("inputs", program.input, inputs), ("outputs", program.output, outputs)):
        b, values = program.buffers[name], np.asarray(given)
        if values.ndim != 4 or values.shape[1:] != b.shape or len(values) != len(inputs) or not len(values):
            want = ", ".join(map(str, b.shape))
            raise DataError(f"test {word} have shape {values.shape}; they must be (n, {want}), n at least 1")
        exact = values.astype(b.dtype)
        if not np.array_equal(exact, values):
            raise DataError(f"test {word} do not fit {b.dtype}; give them as the integers of buffer '{name}'")
        found[word] = c_array(f"test_{word}", exact, CTYPES[b.dtype])
    return found
