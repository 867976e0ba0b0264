"""Product quantisation and a binary associative memory: an example is a codeword per sub-space, learning sets bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.associative.distance import METRICS, distances
from thrifty.associative.knobs import refusals
from thrifty.associative.state import Field, State
from thrifty.associative.vote import Ballot, bounds
from thrifty.errors import KnobError

Array = npt.NDArray[Any]

CELLS = ("bits", "counts")
FULL = 255  # of a counting cell
LOG_BITS = 8  # fraction bits of log2
# log2(1 + m / 256) in units of 2^-8, rounded half up
LOG2 = np.floor(np.log2(1.0 + np.arange(256) / 256.0) * 256.0 + 0.5).astype(np.uint8)
AT_A_TIME = 1 << 22


@dataclass(frozen=True, eq=False)
class Codes:
    """A learner of levels (n, features): which codewords of each sub-space a class has been seen with.

    code_p(x) = the nearest codeword of sub-space p, of equal ones the first.
        "bits"    learn: M[c, p, code_p] = 1.        score of c: how many of the P bits M[c, p, code_p(x)] are 1
        "counts"  learn: N[c, p, code_p] += 1, up to 255, n[c] += 1.
                  score of c: sum over p of log2(N[c, p, code_p(x)] + 1) - log2(n[c] + K), in units of 2^-8 (`log2`)
    Bits learn idempotently and in any order. Only classes with examples can win; ties go to the lowest class.

    Source: Incremental learning with pre-trained CNNs and binary associative memories (ICLR workshop 2017), known here
    from its abstract and from arXiv:1911.07847; the counting form is naive Bayes with add-one smoothing.

    >>> codes = Codes(np.array([[0, 0], [255, 255]], np.uint8), classes=2, parts=2)
    >>> state = codes.fresh()
    >>> codes.learn(state, np.array([[3, 9], [250, 240]]), np.array([0, 1]))
    2
    >>> codes.vote(state, np.array([[200, 230]])).winners()
    array([1], dtype=int32)
    """

    codebook: Array  # (K, features) uint8 levels: columns of part p are its K codewords
    classes: int
    parts: int = 16
    bits: int = 8
    metric: str = "l2"
    cells: str = "bits"  # of CELLS

    kind = "codes"
    tie = "lowest"

    def __post_init__(self) -> None:
        book = np.asarray(self.codebook)
        if book.ndim != 2 or not book.size or len(book) > 65535 or book.shape[1] > 65535:
            raise KnobError(f"codebook has shape {book.shape}; it must be (K, features), at most 65535 each")
        limits = (("classes", 1, 65535), ("parts", 1, book.shape[1]), ("bits", 1, 8))
        bad = refusals(self, limits, (("metric", METRICS), ("cells", CELLS)))
        if not bad and (book.min() < 0 or book.max() > self.top):
            bad.append(f"codebook has values {book.min()}..{book.max()}; levels are 0..{self.top}")
        if bad:
            raise KnobError("; ".join(bad))
        object.__setattr__(self, "codebook", book.astype(np.uint8))

    @property
    def features(self) -> int:
        """Dimensions of an example."""
        return int(self.codebook.shape[1])

    @property
    def words(self) -> int:
        """Codewords per sub-space, K."""
        return len(self.codebook)

    @property
    def top(self) -> int:
        """The largest level."""
        return (1 << self.bits) - 1

    def fields(self) -> tuple[Field, ...]:
        """Return the arrays of the state; bit k of sub-space p is bit p K + k of the class, lowest of a byte first."""
        saturated = Field("saturated", "uint32", (1,), shared=True)
        if self.cells == "bits":
            row = (self.parts * self.words + 7) // 8
            valid = Field("valid", "uint8", ((self.classes + 7) // 8,), shared=True)
            return (saturated, valid, Field("cells", "uint8", (self.classes, row)))
        return (
            saturated,
            Field("seen", "uint32", (self.classes,)),
            Field("cells", "uint8", (self.classes, self.parts, self.words)),
        )

    def fresh(self) -> State:
        """Return the state of a learner that has seen nothing."""
        return State(self.fields())

    def codes(self, x_nd: Array) -> Array:
        """Return the codeword of each sub-space of each example, levels (n, d) -> int64 (n, P)."""
        found = np.empty((len(x_nd), self.parts), np.int64)
        ends, step = bounds(self.features, self.parts), max(1, AT_A_TIME // self.words)
        for start in range(0, len(x_nd), step):
            rows = slice(start, start + step)
            for p in range(self.parts):
                part = slice(ends[p], ends[p + 1])
                away = distances(x_nd[rows, part], self.codebook[:, part], self.metric, self.bits)
                found[rows, p] = away.argmin(axis=1)
        return found

    def learn(self, state: State, x_nd: Array, slots: Array) -> int:
        """Add examples to the state and return how many were learned, which is all."""
        codes, slots = self.codes(x_nd), np.asarray(slots, np.int64)
        if self.cells == "bits":
            place = np.arange(self.parts) * self.words + codes
            np.bitwise_or.at(state["cells"], (slots[:, None], place >> 3), (1 << (place & 7)).astype(np.uint8))
            np.bitwise_or.at(state["valid"], slots >> 3, (1 << (slots & 7)).astype(np.uint8))
            return len(codes)
        wide = state["cells"].astype(np.int64)
        np.add.at(wide, (slots[:, None], np.arange(self.parts), codes), 1)
        state["cells"][:] = np.minimum(wide, FULL)
        state["seen"][:] += np.bincount(slots, minlength=self.classes).astype(np.uint32)
        return len(codes)

    def new_class(self, state: State, slot: int) -> None:
        """Forget one class, so that its number can be used again."""
        state.clear_class(slot)
        if self.cells == "bits":
            state["valid"][slot >> 3] &= 0xFF ^ (1 << (slot & 7))

    def valid(self, state: State) -> Array:
        """Return which classes have examples (C,) bool."""
        if self.cells == "bits":
            found = np.unpackbits(state["valid"], bitorder="little")[: self.classes] > 0
        else:
            found = state["seen"] > 0
        result: Array = found
        return result

    def vote(self, state: State, x_nd: Array) -> Ballot:
        """Return the votes, or scores, of queries, levels (n, d)."""
        codes = self.codes(x_nd)
        part = np.arange(self.parts)
        valid = self.valid(state)
        votes = np.zeros((len(codes), self.classes), np.int64)
        if self.cells == "bits":
            bits = np.unpackbits(state["cells"], axis=1, bitorder="little")
            for c in np.flatnonzero(valid):
                votes[:, c] = bits[c, part * self.words + codes].sum(axis=1)
        else:
            for c in np.flatnonzero(valid):
                share = log2(state["cells"][c, part, codes].astype(np.int64) + 1).sum(axis=1)
                votes[:, c] = share - self.parts * int(log2(np.array(int(state["seen"][c]) + self.words)))
        return Ballot(votes, np.zeros_like(votes), valid)

    def fill(self, state: State) -> float:
        """Return the share of the cells of valid classes that are not zero; binary memories fail towards 1."""
        valid = self.valid(state)
        if not valid.any():
            return 0.0
        if self.cells == "counts":
            return float((state["cells"][valid] > 0).mean())
        used = self.parts * self.words
        return float(np.unpackbits(state["cells"][valid], axis=1, bitorder="little")[:, :used].mean())

    def operations(self) -> dict[str, int]:
        """Return the additions and multiplications of learning and of classifying one example, all classes known.

        Both encode: a subtraction, a multiplication ("l1": none) and an addition per feature and codeword. Learning
        then writes a cell per sub-space, classifying adds one per sub-space and class.
        """
        encode = (2 if self.metric == "l1" else 3) * self.features * self.words
        return {"learn": encode + self.parts, "classify": encode + self.parts * self.classes}


def log2(v: Array) -> Array:
    """Return log2 of positive integers below 2^32, in units of 2^-8, from a table of 256 entries.

    With e the position of the highest bit, m the eight bits behind it: 256 e + LOG2[m]. Exact for powers of two.

    >>> log2(np.array([1, 2, 3, 1024]))
    array([   0,  256,  406, 2560])
    """
    v = np.asarray(v, np.int64)
    e = np.zeros_like(v)
    for step in (16, 8, 4, 2, 1):
        more = (v >> e) >= (1 << step)
        e += np.where(more, step, 0)
    m = ((v << (31 - e)) >> 23) & 255
    result: Array = (e << LOG_BITS) + LOG2[m]
    return result
