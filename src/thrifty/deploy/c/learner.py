"""The C of a learner behind a network: it learns and classifies on the microcontroller."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from thrifty.associative import Anchors, Codes, Feed, Memory, State, bounds
from thrifty.associative.distance import distance_bits
from thrifty.deploy.c.ccall import SUFFIXES
from thrifty.deploy.c.manifest import LearnerPort
from thrifty.deploy.c.text import CTYPES, Array, c_array
from thrifty.deploy.program import ITEM_BYTES

ROUNDING = {"half_up": 0, "floor": 1, "stochastic": 2}
SEEN_WORDS = {
    "seen": "examples of each class; the round-robin counter of its anchors",
    "saturated": "features outside their calibrated range, of all examples learned",
    "counts": "examples of each anchor: class, sub-space, anchor",
    "draws": "random numbers drawn",
    "sums": "sums of levels: class, anchor, feature",
    "means": "rounded means: class, anchor, feature",
    "valid": "a bit per class: has examples",
}
CELL_WORDS = {
    "bits": "a bit per codeword seen: rows of class, bit (sub-space, codeword)",
    "counts": "how often: class, sub-space, codeword",
}


@dataclass(frozen=True, eq=False)
class Recorded:
    """Requests with the answers and the last state that the interpreter computed, for the self-test."""

    what: Array  # (n,) uint8
    labels: Array  # (n,) int32
    inputs: Array  # (n, H, W, C)
    answers: Array  # (n,) int32
    state: bytes


@dataclass(frozen=True, eq=False)
class LearnerC:
    """What `emit` adds behind a network whose output is the features; an emit.Addition."""

    memory: Memory
    feed: Feed
    dtype: str  # of the features: int8, uint8, int16
    start: State | None = None  # what is known from the first moment; None: nothing
    recorded: Recorded | None = None

    headers = ("associative.h",)

    @property
    def level(self) -> str:
        """Type of the prepared levels: that of what they are compared with."""
        return self.memory.mean_type if isinstance(self.memory, Anchors) else "uint8"

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the prepared levels, and behind them of the codewords."""
        levels = self.memory.features * ITEM_BYTES.get(self.level, 4)
        return self._codes_at + 2 * self.memory.parts if isinstance(self.memory, Codes) else levels

    @property
    def _codes_at(self) -> int:
        return (self.memory.features + 1) // 2 * 2

    @property
    def port(self) -> LearnerPort:
        """What model.json says."""
        m = self.memory
        return LearnerPort(m.kind, m.features, m.classes, State(m.fields()).size_bytes)

    def texts(self, values: Mapping[str, Any], scratch: str) -> Mapping[str, str]:
        """Return the parts of the header, the source, the self-test and the README; arguments as of Addition."""
        m, prefix = self.memory, values["prefix"]
        seen = isinstance(m, Anchors) or m.cells == "counts"
        known = {
            **values,
            "memory": m,
            "words": describe(m),
            "fields": [self._field(f.name) for f in State(m.fields()).fields],
            "state_bytes": self.port.state_bytes,
            "scratch": scratch,
            "scratch_bytes": self.scratch_bytes,
            "level": CTYPES[self.level],
            "each": m.anchors if isinstance(m, Anchors) else m.words,
            "most": m.n_max if isinstance(m, Anchors) else 0,
            "seed": m.seed if isinstance(m, Anchors) else 0,
            "fraction": m.fraction if isinstance(m, Anchors) else 0,
            "ties": f"{prefix}_ballot.ties" if m.tie == "distance" else "0",
            "valid": "0" if seen else f"{prefix}_state.valid",
            "seen": f"{prefix}_state.seen" if seen else "0",
            "bitset": not seen,
            "start": self._start(),
            "requests": self._requests(values),
            **(self._anchors(m, prefix) if isinstance(m, Anchors) else self._codes(m, prefix, scratch)),
        }
        parts = {"header": "learner.h", "source": "learner.c", "main": "learner_main.c", "readme": "learner.md"}
        return {part: _template(name).render(known).rstrip("\n") for part, name in parts.items()}

    def _field(self, name: str) -> dict[str, Any]:
        f = next(f for f in self.memory.fields() if f.name == name)
        size = int(np.prod(f.shape))
        words = (
            CELL_WORDS[self.memory.cells] if isinstance(self.memory, Codes) and name == "cells" else SEEN_WORDS[name]
        )
        shape = {"ctype": CTYPES[f.dtype], "size": size, "row": size // f.shape[0]}
        return {"name": name, "words": words, "shared": f.shared, **shape}

    def _start(self) -> str:
        """Return the initialiser of the state; nothing for one that has seen nothing, which costs no flash."""
        if self.start is None or not any(self.start.tobytes()):
            return ""
        arrays = (self.start[f.name].reshape(-1).tolist() for f in self.start.fields)
        return " = {\n" + "".join(f"    {{{', '.join(map(str, a))}}},\n" for a in arrays) + "}"

    def _prepare(self, prefix: str, shift: int) -> str:
        f = self.feed
        types = f"{SUFFIXES[self.dtype]}, {_suffix(self.level)}"
        numbers = f"{f.offset}, {f.multiplier}, {f.shift}, {f.top}, {shift}"
        return f"THRIFTY_PREPARE({prefix}_prepare, {types}, {numbers})"

    def _anchors(self, m: Anchors, prefix: str) -> dict[str, Any]:
        state, mean, acc = f"{prefix}_state", _suffix(m.mean_type), _wide(m.distance_bits)
        total, nearest = _suffix(m.sum_type), m.policy == "nearest"
        distance = f"{prefix}_distance, {acc}, {_count(m)}"
        types = f"{prefix}_move, {total}, {mean}"
        if m.form == "sum":
            move = f"THRIFTY_MOVE_SUM({types})"
        else:
            move = f"THRIFTY_MOVE_MEAN({types}, {ROUNDING[m.rounding]})"
        if nearest:
            counter = _suffix(next(f.dtype for f in m.fields() if f.name == "counts"))
            learn = f"THRIFTY_LEARN_NEAREST({prefix}_learn_anchor, {types}, {counter}, {distance})"
        else:
            learn = f"THRIFTY_LEARN_TURNS({prefix}_learn_anchor, {types})"
        sums = f"{state}.sums" if m.form == "sum" else "0"
        draws = f"{state}.draws" if m.rounding == "stochastic" else "0"
        counts = f", {state}.counts" if nearest else ""
        ties = f"{prefix}_ballot.ties" if m.tie == "distance" else "0"
        return {
            "definitions": [
                self._prepare(prefix, m.fraction),
                f"THRIFTY_DISTANCE({m.metric}, {mean}, {prefix}_distance, {acc})",
                move,
                learn,
                f"THRIFTY_ANCHORS_VOTE({prefix}_vote_anchors, {mean}, {distance})",
            ],
            "learn": f"    return {prefix}_learn_anchor(&{prefix}_learner, {state}.seen, {sums}, {state}.means,\n"
            f"                              levels, {draws}, (uint32_t)label{counts});",
            "vote": f"    {prefix}_vote_anchors(&{prefix}_learner, {state}.seen, {state}.means, levels,\n"
            f"                       {prefix}_ballot.votes, {ties});",
        }

    def _codes(self, m: Codes, prefix: str, scratch: str) -> dict[str, Any]:
        ends = bounds(m.features, m.parts)
        packed = np.concatenate([m.codebook[:, a:b].reshape(-1) for a, b in itertools.pairwise(ends)])
        acc = _wide(distance_bits(m.bits, max(b - a for a, b in itertools.pairwise(ends)), m.metric))
        state, first = f"{prefix}_state", "valid" if m.cells == "bits" else "seen"
        encode = (
            f"    uint16_t *const codes = (uint16_t *)({scratch} + {self._codes_at});\n"
            f"    {prefix}_encode(&{prefix}_learner, {prefix}_codebook, levels, codes);\n"
        )
        seen = "" if m.cells == "bits" else f"{state}.seen, "
        return {
            "definitions": [
                "/* sub-space by sub-space, its codewords one behind the other */",
                c_array(f"{prefix}_codebook", packed, "uint8_t"),
                self._prepare(prefix, 0),
                f"THRIFTY_DISTANCE({m.metric}, u8, {prefix}_distance, {acc})",
                f"THRIFTY_ENCODE({prefix}_encode, {prefix}_distance, {acc}, {_count(m)})",
            ],
            "learn": f"{encode}    thrifty_{m.cells}_learn(&{prefix}_learner, {state}.{first}, {state}.cells, codes, "
            "(uint32_t)label);\n    return 1;",
            "vote": f"{encode}    thrifty_{m.cells}_vote(&{prefix}_learner, {seen}{state}.cells, codes, "
            f"{prefix}_ballot.votes);",
        }

    def _requests(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        r = self.recorded
        if r is None:
            return None
        return {
            "count": len(r.what),
            "what": c_array("test_what", r.what, "uint8_t"),
            "labels": c_array("test_labels", r.labels, "int32_t"),
            "inputs": c_array("test_inputs", r.inputs, values["input"]["ctype"]),
            "answers": c_array("test_answers", r.answers, "int32_t"),
            "state": c_array("test_state", np.frombuffer(r.state, np.uint8), "uint8_t"),
        }


def describe(m: Memory) -> str:
    """Return a learner in words.

    >>> describe(Anchors(64, 10))
    'up to 10 classes, 64 features in 16 sub-spaces, 4 anchors (turns, sum, l2)'
    """
    room = f"up to {m.classes} classes, {m.features} features in {m.parts} sub-spaces"
    if isinstance(m, Anchors):
        return f"{room}, {m.anchors} anchors ({m.policy}, {m.form}, {m.metric})"
    return f"{room}, {m.words} codewords, memory of {m.cells} ({m.metric})"


def _count(m: Memory) -> str:
    """Return the length of the sub-vectors when all have the same, else 0."""
    return f"{m.features // m.parts}u" if m.features % m.parts == 0 else "0"


def _suffix(dtype: str) -> str:
    return {"uint16": "u16", "uint32": "u32"}.get(dtype) or SUFFIXES[dtype]


def _wide(bits: int) -> str:
    """Return the type of a distance, which is less than its largest number."""
    return "uint32_t" if bits < 32 else "uint64_t"


@functools.cache
def _template(name: str) -> jinja2.Template:
    text = resources.files("thrifty.deploy.c").joinpath("templates", f"{name}.j2").read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
