"""Fixed-point anchors: a few means per class and sub-space, learned one example at a time, on integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.associative.distance import METRICS, distance_bits, distances
from thrifty.associative.knobs import refusals
from thrifty.associative.state import Field, State
from thrifty.associative.vote import Ballot, bounds, longest
from thrifty.errors import KnobError

Array = npt.NDArray[Any]

POLICIES = ("turns", "nearest")
FORMS = ("sum", "mean")
ROUNDINGS = ("half_up", "floor", "stochastic")
TIES = ("distance", "lowest")
AT_A_TIME = 1 << 22  # distances held at once


@dataclass(frozen=True)
class Anchors:
    """A learner of levels (n, features), 0..2^bits - 1: `anchors` means for each class and each of `parts` sub-spaces.

    With "turns", example number t of class c goes to anchor i = t mod anchors (counted from 0) in all sub-spaces, so
    that the count of the class is the round-robin counter and the counts of its anchors. With "nearest", the first
    `anchors` examples do, and later ones go to the nearest anchor of their class in each sub-space (of equal ones the
    first), each with a counter of its own. With n the examples of the anchor, this one included:

        "sum"    S += x;  Y = round(S 2^fraction / n)              exact: Y is the rounded mean of all n examples
        "mean"   Y += round((x 2^fraction - Y) / n)                half the memory; stops moving once
                                                                   |x - Y| / n < 2^-(fraction + 1), unless stochastic

    round is half up: floor(v + 1/2). An anchor with n_max examples learns no more. A query x votes in each sub-space
    for the class of the nearest used anchor, by the distance between x 2^fraction and Y; of equal ones the lowest
    class. The class with most votes wins; `tie` says what decides between equals: the smaller sum over sub-spaces of
    the distance to the class's nearest anchor, then the lower class; or the lower class at once.

    Source: Efficient Hardware Implementation of Incremental Learning and Inference on Chip, arXiv:1911.07847 (majority
    votes over quantised anchors); widths, rounding and the rules above are this project's. Every number fits 32 bits,
    distances where needed 64.

    >>> learner = Anchors(features=2, classes=2, parts=1, anchors=1)
    >>> state = learner.fresh()
    >>> learner.learn(state, np.array([[0, 0], [200, 200]]), np.array([0, 1]))
    2
    >>> learner.vote(state, np.array([[180, 220]])).winners()
    array([1], dtype=int32)
    """

    features: int
    classes: int  # room for so many
    parts: int = 16
    anchors: int = 4
    bits: int = 8  # of a level: 1..8
    fraction: int = 4  # bits of Y below the point: 0..16
    policy: str = "turns"  # of POLICIES
    form: str = "sum"  # of FORMS
    rounding: str = "half_up"  # of ROUNDINGS; of the mean form only
    metric: str = "l2"  # of METRICS
    tie: str = "distance"  # of TIES
    n_max: int = 4096  # examples per anchor
    seed: int = 0  # of stochastic rounding

    kind = "anchors"

    def __post_init__(self) -> None:
        limits = (
            ("features", 1, 65535), ("classes", 1, 65535), ("parts", 1, self.features), ("anchors", 1, 255),
            ("bits", 1, 8), ("fraction", 0, 16), ("n_max", 1, 1 << 24), ("seed", 0, 2**32 - 1),
        )  # fmt: skip
        words = (("policy", POLICIES), ("form", FORMS), ("rounding", ROUNDINGS), ("metric", METRICS), ("tie", TIES))
        bad = refusals(self, limits, words)
        if not bad and self.form == "sum":
            if self.rounding != "half_up":
                bad.append(f"rounding is '{self.rounding}', an option of form='mean'; sums are exact")
            if (self.n_max * self.top << self.fraction) + self.n_max // 2 >= 1 << 32:
                bad.append(f"n_max is {self.n_max}: the sum times 2^{self.fraction} leaves 32 bits; make either less")
        if bad:
            raise KnobError("; ".join(bad))

    @property
    def top(self) -> int:
        """The largest level."""
        return (1 << self.bits) - 1

    @property
    def mean_bits(self) -> int:
        """Bits of a stored mean Y."""
        return self.bits + self.fraction

    @property
    def mean_type(self) -> str:
        """How means are stored; int16 means never use their sign, so that differences fit the type."""
        return "uint8" if self.mean_bits <= 8 else "int16" if self.mean_bits <= 15 else "uint32"

    @property
    def sum_type(self) -> str:
        """How sums are stored."""
        return "uint16" if self.n_max * self.top < 1 << 16 else "uint32"

    @property
    def distance_bits(self) -> int:
        """Width of the largest distance of one sub-space."""
        return distance_bits(self.mean_bits, longest(self.features, self.parts), self.metric)

    def fields(self) -> tuple[Field, ...]:
        """Return the arrays of the state."""
        shape = (self.classes, self.anchors, self.features)
        found = [Field("seen", "uint32", (self.classes,)), Field("saturated", "uint32", (1,), shared=True)]
        if self.rounding == "stochastic":
            found.append(Field("draws", "uint32", (1,), shared=True))
        if self.policy == "nearest":
            kept = "uint16" if self.n_max < 1 << 16 else "uint32"
            found.append(Field("counts", kept, (self.classes, self.parts, self.anchors)))
        if self.form == "sum":
            found.append(Field("sums", self.sum_type, shape))
        return (*found, Field("means", self.mean_type, shape))

    def fresh(self) -> State:
        """Return the state of a learner that has seen nothing."""
        return State(self.fields())

    def learn(self, state: State, x_nd: Array, slots: Array) -> int:
        """Add examples to the state, in their order, and return how many were learned; those of full anchors are not.

        x_nd: levels (n, d). slots: class numbers (n,) below `classes`.
        """
        if self.form == "mean" or self.policy == "nearest":
            return sum(self._one(state, x, int(c)) for x, c in zip(x_nd.astype(np.int64), slots))
        return sum(self._add(state, x_nd[slots == c].astype(np.int64), int(c)) for c in np.unique(slots))

    def _add(self, state: State, x_nd: Array, c: int) -> int:
        """Add examples of one class to its sums, in turns, and write its rounded means."""
        before, room = int(state["seen"][c]), self.n_max * self.anchors
        x_nd = x_nd[: room - before]
        for i in range(min(self.anchors, len(x_nd))):
            a = (before + i) % self.anchors
            sums = state["sums"][c, a].astype(np.int64) + x_nd[i :: self.anchors].sum(axis=0)
            n = (before + len(x_nd) + self.anchors - 1 - a) // self.anchors
            state["sums"][c, a] = sums
            state["means"][c, a] = ((sums << self.fraction) + n // 2) // n
        state["seen"][c] = before + len(x_nd)
        return len(x_nd)

    def _one(self, state: State, x_d: Array, c: int) -> int:
        """Learn one example; return 0 when all anchors that should take it are full."""
        t = int(state["seen"][c])
        if self.policy == "nearest":
            chosen, n = self._counted(state, x_d, c, t)
        else:
            chosen, n = np.full(self.parts, t % self.anchors), np.full(self.parts, t // self.anchors + 1)
        sizes = np.diff(bounds(self.features, self.parts))
        rows = np.flatnonzero(np.repeat(n <= self.n_max, sizes))
        if not rows.size:
            return 0
        self._move(state, x_d[rows], (c, np.repeat(chosen, sizes)[rows], rows), np.repeat(n, sizes)[rows])
        state["seen"][c] = t + 1
        return 1

    def _counted(self, state: State, x_d: Array, c: int, t: int) -> tuple[Array, Array]:
        """Return the anchor of each sub-space (P,) and how many examples it has with this one; count it in."""
        if t < self.anchors:
            chosen = np.full(self.parts, t)
        else:
            gap = (x_d << self.fraction) - state["means"][c].astype(np.int64)
            away = np.abs(gap) if self.metric == "l1" else gap * gap
            chosen = np.add.reduceat(away, bounds(self.features, self.parts)[:-1], axis=1).argmin(axis=0)
        place = (c, np.arange(self.parts), chosen)
        n = state["counts"][place].astype(np.int64) + 1
        state["counts"][place] = np.minimum(n, self.n_max)
        return chosen, n

    def _move(self, state: State, x: Array, place: tuple[Any, ...], n: Array) -> None:
        """Take levels x into the words at `place`, whose anchors have n examples with this one."""
        if self.form == "sum":
            sums = state["sums"][place].astype(np.int64) + x
            state["sums"][place] = sums
            state["means"][place] = ((sums << self.fraction) + n // 2) // n
        else:
            old = state["means"][place].astype(np.int64)
            state["means"][place] = old + self._divided((x << self.fraction) - old, n, state)

    def _divided(self, v: Array, n: Array, state: State) -> Array:
        """Return v / n rounded as the knob says; half up is floor((2 v + n) / (2 n))."""
        if self.rounding == "half_up":
            v, n = 2 * v + n, 2 * n
        if self.rounding != "stochastic":
            whole: Array = v // n
            return whole
        first = int(state["draws"][0])
        counter = (first + np.arange(v.size, dtype=np.uint64)).astype(np.uint32)
        state["draws"][0] = (first + v.size) & 0xFFFFFFFF
        below_n = (mixed(counter, self.seed).astype(np.uint64) * n.astype(np.uint64)) >> np.uint64(32)
        result: Array = (v + below_n.astype(np.int64)) // n
        return result

    def new_class(self, state: State, slot: int) -> None:
        """Forget one class, so that its number can be used again."""
        state.clear_class(slot)

    def valid(self, state: State) -> Array:
        """Return which classes have examples (C,) bool."""
        result: Array = state["seen"] > 0
        return result

    def vote(self, state: State, x_nd: Array) -> Ballot:
        """Return the votes of queries, levels (n, d)."""
        seen = np.minimum(state["seen"].astype(np.int64), self.anchors)
        used = np.arange(self.anchors) < seen[:, None]  # (C, anchors)
        votes = np.zeros((len(x_nd), self.classes), np.int64)
        ties = np.zeros_like(votes)
        valid = seen > 0
        if not valid.any():
            return Ballot(votes, ties, valid)
        step = max(1, AT_A_TIME // used.size)
        for start in range(0, len(x_nd), step):
            rows = slice(start, start + step)
            query = x_nd[rows].astype(np.int64) << self.fraction
            for first, end in zip(*_pairs(bounds(self.features, self.parts))):
                least = self._nearest(query[:, first:end], state["means"][:, :, first:end], used)
                votes[rows][np.arange(len(query)), least.argmin(axis=1)] += 1
                if self.tie == "distance":
                    ties[rows] += np.where(valid, least, 0)
        return Ballot(votes, ties, valid)

    def _nearest(self, query: Array, means: Array, used: Array) -> Array:
        """Return the distance of each query to the nearest used anchor of each class (n, C)."""
        found = np.full((len(query), *used.shape), np.iinfo(np.int64).max)
        found[:, used] = distances(query, means[used], self.metric, self.mean_bits)
        least: Array = found.min(axis=2)
        return least

    def operations(self) -> dict[str, int]:
        """Return the additions and multiplications of learning and of classifying one example, all classes known.

        Learning: an addition and a division per feature ("mean": a subtraction more); with "nearest", a distance
        to each anchor of the class. Classifying: a distance to each anchor of all classes. A distance: a
        subtraction, a multiplication ("l1": none) and an addition per feature.
        """
        each = 2 if self.metric == "l1" else 3
        search = each * self.features * self.anchors if self.policy == "nearest" else 0
        return {
            "learn": self.features * (2 if self.form == "sum" else 3) + search,
            "classify": each * self.features * self.anchors * self.classes,
        }


def mixed(counter: Array, seed: int) -> Array:
    """Return 32 random bits for each counter: MurmurHash3's finaliser (public domain) of counter * odd + seed.

    >>> mixed(np.array([0, 1], np.uint32), 1)
    array([1364076727, 2789948889], dtype=uint32)
    """
    x = counter.astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    result: Array = x ^ (x >> np.uint32(16))
    return result


def _pairs(ends: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ends[:-1], ends[1:]
