"""Incremental learning on integers, as a chip does it: quantised features, counted anchors or associative memories.

What the estimators compute is `thrifty.associative`, which `deploy.learner` writes as C, so that a microcontroller that
sees the same levels in the same order has the same state, byte for byte: `memory_` and `state_` go into a Learner.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt

from thrifty.associative import Anchors, Ballot, Codes, Feed, Memory, Range, State, bounds
from thrifty.errors import DataError, KnobError, StoreError, close_to
from thrifty.fewshot import saved
from thrifty.fewshot.classifier import Labels
from thrifty.fewshot.preprocess import Array, InputError, OptionError
from thrifty.fewshot.voting import Footprint, VotingClassifier, flattened, kind_of, parts_of

VERSION = 1
Self = TypeVar("Self", bound="OnChip")
Limits = tuple[float, float] | None


class OnChip(VotingClassifier):
    """What the two on-chip estimators share: calibration, slots for classes, and the state.

    Features are quantised to `bits` bits over a range that is frozen before the first example is learned: the knob
    `limits`, or that of the features given to `calibrate`, or else of those of the first call. What lies outside
    later saturates, which is counted. Classes get the next free slot when their first example comes; slots decide
    complete ties, so that names of classes never matter.
    """

    kind: ClassVar[str]
    # knobs, of both
    parts: int | None
    bits: int
    limits: Limits
    metric: str
    capacity: int | None
    seed: int

    classes_: Labels  # (C,) sorted, with those announced and not seen
    known_: list[Any]  # labels in the order of their slots
    memory_: Memory  # the integer learner: layout and rules
    state_: State  # its words
    range_: Range  # frozen
    refused_: int  # examples not learned because the anchors of their class were full

    def calibrate(self: Self, X: npt.ArrayLike) -> Self:
        """Freeze what is fixed before learning, from unlabelled features (n, d) or (n, R, d), and forget everything."""
        x_nd = self._checked(flattened(X)[0], reset=True)
        self._freeze(x_nd)
        return self

    def fit(self: Self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Forget everything, calibrate on X (n, d) or (n, R, d), then learn it with labels y (n,), in its order."""
        x_nd, y_n = self._examples(X, y, reset=True)
        self._freeze(x_nd)
        self._learn(x_nd, y_n)
        return self

    def partial_fit(self: Self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> Self:
        """Learn more examples, in their order; new labels become new classes.

        X: (n, d) or (n, R, d). y: (n,). classes: labels that will come later; until they do, they are never predicted.
        """
        first = not hasattr(self, "state_")
        x_nd, y_n = self._examples(X, y, reset=first)
        if first:
            self._freeze(x_nd)
        if classes is not None:
            self._announce(np.unique(np.asarray(classes)))
        self._learn(x_nd, y_n)
        return self

    def forget(self: Self, label: Any) -> Self:
        """Forget one class; its slot is free for an announced or new example of the same label."""
        self.memory_.new_class(self.state_, self.known_.index(label))
        return self

    def levels(self, X: npt.ArrayLike) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the uint8 levels (n, d) of features, and how many values of each lay outside the range (n,)."""
        return self.range_.levels(self._queries(X))

    @property
    def saturated_(self) -> int:
        """How many feature values of all learned examples lay outside the range."""
        return int(self.state_["saturated"][0])

    def feed(self, dtype: str, scale: float) -> Feed:
        """Return what makes levels of a network's stored integers; the levels agree up to rounding, see Feed.like."""
        return Feed.like(self.range_, dtype, scale)

    @property
    def footprint_(self) -> Footprint:
        """Bytes of the state as on the chip, and operations, counted, for the classes known now."""
        operations = self.memory_.operations()
        constant = self.memory_.codebook.size if isinstance(self.memory_, Codes) else 0
        return Footprint(self.state_.size_bytes, constant, operations["learn"], operations["classify"])

    # ---- saving

    def save(self, path: str | Path) -> Path:
        """Write the fitted estimator to one safetensors file (temporary, then renamed) and return its path."""
        content = {
            "knobs": self.get_params(),
            "classes": saved.labels_out(self.classes_),
            "slots": np.searchsorted(self.classes_, np.array(self.known_, self.classes_.dtype)).tolist(),
            "features": self.n_features_in_,
            "names": getattr(self, "feature_names_in_", np.empty(0)).tolist(),
            "range": [self.range_.low, self.range_.high],
            "room": self.memory_.classes,
            "refused": self.refused_,
        }
        arrays: dict[str, Any] = {"state": np.frombuffer(self.state_.tobytes(), np.uint8)}
        arrays["codebook"] = self.memory_.codebook if isinstance(self.memory_, Codes) else np.zeros(0, np.uint8)
        return saved.write(path, self.kind, VERSION, content, arrays)

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Read what `save` wrote. Raises StoreError when anything is missing, more, or of another shape."""
        content, arrays = saved.read(path, cls.kind, VERSION, frozenset({"state", "codebook"}))
        try:
            new = cls(**_tuples(content["knobs"]))
            new.n_features_in_ = int(content["features"])
            if content["names"]:
                new.feature_names_in_ = np.array(content["names"], dtype=object)
            new.classes_ = saved.labels_in(content["classes"])
            new.known_ = [new.classes_[i] for i in content["slots"]]
            low, high = content["range"]
            new.range_ = Range(tuple(low), tuple(high), new.bits)
            new.memory_ = new._memory(int(content["room"]), new.n_features_in_, arrays["codebook"])
            new.state_ = State(new.memory_.fields(), arrays["state"].tobytes())
            new.refused_ = int(content["refused"])
        except (KeyError, TypeError, ValueError, IndexError, DataError, KnobError) as err:
            raise StoreError(f"{path} does not describe a {cls.kind}: {err}") from err
        if new.memory_.features != new.n_features_in_:
            raise StoreError(f"{path} has a codebook of {new.memory_.features} features, not {new.n_features_in_}")
        return new

    # ---- learning

    @abstractmethod
    def _memory(self, classes: int, features: int, codebook: npt.NDArray[Any]) -> Memory:
        """Return the integer learner with room for some classes."""

    def _codebook(self, levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the constants of the learner, made of calibration features."""
        return np.zeros(0, np.uint8)

    def _freeze(self, x_nd: Array) -> None:
        if self.capacity is not None and (not isinstance(self.capacity, (int, np.integer)) or self.capacity < 1):
            raise OptionError(f"capacity is {self.capacity!r}; it must be None or a positive integer")
        low, high = self._limits(x_nd)
        try:
            self.range_ = Range((low,), (high,), self.bits)
            codebook = self._codebook(self.range_.levels(x_nd)[0])
            self.memory_ = self._memory(int(self.capacity or 1), x_nd.shape[1], codebook)
        except KnobError as err:
            raise OptionError(str(err)) from err
        self.state_ = self.memory_.fresh()
        self.classes_, self.known_, self.refused_ = np.empty(0), [], 0

    def _limits(self, x_nd: Array) -> tuple[float, float]:
        if self.limits is not None:
            return float(self.limits[0]), float(self.limits[1])
        single = x_nd.astype(np.float32)  # so that float64 copies of float32 features get the same levels
        low, high = float(single.min()), float(single.max())
        return (low, high) if high > low else (low, low + 1.0)

    def _announce(self, labels: Labels) -> None:
        """Add labels to classes_, which stays sorted."""
        if len(self.classes_) and kind_of(labels) != kind_of(self.classes_):
            raise InputError(f"labels are {labels.dtype}, but the classes known so far are {self.classes_.dtype}")
        self.classes_ = np.union1d(self.classes_, labels) if len(self.classes_) else labels

    def _learn(self, x_nd: Array, y_n: Labels) -> None:
        labels, first, index = np.unique(y_n, return_index=True, return_inverse=True)
        have = set(self.known_)
        new = [labels[i] for i in np.argsort(first) if labels[i] not in have]
        if self.capacity is not None and len(self.known_) + len(new) > self.capacity:
            raise InputError(f"{len(self.known_) + len(new)} classes, but capacity is {self.capacity}")
        self._announce(labels)
        self.known_ = [*self.known_, *new]
        if len(self.known_) > self.memory_.classes:
            self.memory_ = replace(self.memory_, classes=len(self.known_))
            self.state_ = self.state_.widened(self.memory_.fields())
        slot = {label: i for i, label in enumerate(self.known_)}
        levels, outside = self.range_.levels(x_nd)
        self.state_["saturated"][0] += np.uint32(outside.sum())
        slots = np.array([slot[label] for label in labels], np.int64)[index]
        self.refused_ += len(slots) - self.memory_.learn(self.state_, levels, slots)

    # ---- predicting

    def _slots(self) -> npt.NDArray[np.int64]:
        """Return the slot of each class of classes_, a number behind all slots for those only announced."""
        slot = {label: i for i, label in enumerate(self.known_)}
        return np.array([slot.get(label, len(slot) + i) for i, label in enumerate(self.classes_)], np.int64)

    def _order(self) -> npt.NDArray[Any]:
        return self._slots()

    def _ballot(self, x_nd: Array) -> Ballot:
        ballot = self.memory_.vote(self.state_, self.range_.levels(x_nd)[0])
        slots = self._slots()
        seen = slots < len(self.known_)
        wide = np.zeros((len(x_nd), len(slots)), np.int64)
        votes, ties, valid = wide, wide.copy(), np.zeros(len(slots), bool)
        votes[:, seen], ties[:, seen] = ballot.votes[:, slots[seen]], ballot.ties[:, slots[seen]]
        valid[seen] = ballot.valid[slots[seen]]
        return Ballot(votes, ties, valid)


class OnChipAnchors(OnChip):
    """TILDA on integers: counted anchors per class and sub-space, exact sums or shifted means, majority vote.

    The rules are those of thrifty.associative.Anchors: a class's anchors take turns, or the nearest one learns;
    distances and divisions are exact or rounded half up; every word has a fixed width. `capacity` fixes the room for
    classes, as on a chip; without, it grows.

    Source: Efficient Hardware Implementation of Incremental Learning and Inference on Chip,
    arXiv:1911.07847; widths and rounding rules are this project's, the paper's were not available.

    Raises OptionError (a KnobError and a ValueError) and InputError (a DataError and a ValueError).

    >>> model = OnChipAnchors(anchors=1, limits=(0, 255))
    >>> model.partial_fit([[9, 9]], ["low"]).partial_fit([[200, 200]], ["high"]).predict([[170, 190]])
    array(['high'], dtype='<U4')
    """

    kind: ClassVar[str] = "OnChipAnchors"

    def __init__(
        self,
        parts: int | None = None,  # sub-spaces P; None: 16, but at least four features in each
        anchors: int = 4,  # kA, per class and sub-space
        *,
        policy: str = "turns",  # which anchor learns: they take "turns", or the "nearest" one does
        bits: int = 8,  # of a quantised feature: 1..8
        fraction: int = 4,  # bits of a mean below the point
        form: str = "sum",  # "sum": exact; "mean": less memory, with a dead zone
        rounding: str = "half_up",  # of the mean form: "half_up", "floor" or "stochastic"
        metric: str = "l2",  # "l2" or "l1"
        tie: str = "distance",  # between equal votes: "distance" (smaller sum), or "lowest" slot
        n_max: int = 4096,  # examples that an anchor takes
        limits: Limits = None,  # of the features; None: calibrated
        capacity: int | None = None,  # room for classes; None: as many as come
        seed: int = 0,  # of stochastic rounding
    ) -> None:
        self.parts = parts
        self.anchors = anchors
        self.policy = policy
        self.bits = bits
        self.fraction = fraction
        self.form = form
        self.rounding = rounding
        self.metric = metric
        self.tie = tie
        self.n_max = n_max
        self.limits = limits
        self.capacity = capacity
        self.seed = seed

    def _memory(self, classes: int, features: int, codebook: npt.NDArray[Any]) -> Anchors:
        return Anchors(
            features, classes, parts_of(self.parts, features), self.anchors, self.bits, self.fraction, self.policy,
            self.form, self.rounding, self.metric, self.tie, self.n_max, self.seed,
        )  # fmt: skip


class OnChipCodes(OnChip):
    """Product quantisation and a binary associative memory per class: learning sets one bit per sub-space.

    The codebook has `words` sub-vectors per sub-space, drawn at random from the calibration features ("random") or
    their k-means ("kmeans"). cells="counts" keeps small counters in the place of bits and votes as naive Bayes.
    Bits fill up: with many different examples per class all classes tie; `fill_` says how far that is.

    Source: Incremental learning with pre-trained CNNs and binary associative memories (ICLR workshop 2017); the rules
    are thrifty.associative.Codes, the papers' own sizes were not available.

    Raises OptionError (a KnobError and a ValueError) and InputError (a DataError and a ValueError).

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((60, 8)) + 6.0 * np.repeat(np.eye(2, 8), 30, axis=0)
    >>> OnChipCodes(words=16).fit(x, ["a"] * 30 + ["b"] * 30).predict(x[[0, 59]])
    array(['a', 'b'], dtype='<U1')
    """

    kind: ClassVar[str] = "OnChipCodes"

    def __init__(
        self,
        parts: int | None = None,  # sub-spaces P; None: 16, but at least four features in each
        words: int = 64,  # codewords K per sub-space; fewer when calibration has fewer examples
        *,
        cells: str = "bits",  # "bits" or "counts"
        codebook: str = "random",  # "random" sub-vectors of calibration features, or "kmeans"
        bits: int = 8,  # of a quantised feature: 1..8
        metric: str = "l2",  # "l2" or "l1"
        limits: Limits = None,  # of the features; None: calibrated
        capacity: int | None = None,  # room for classes; None: as many as come
        seed: int = 0,  # of the codebook
    ) -> None:
        self.parts = parts
        self.words = words
        self.cells = cells
        self.codebook = codebook
        self.bits = bits
        self.metric = metric
        self.limits = limits
        self.capacity = capacity
        self.seed = seed

    @property
    def fill_(self) -> float:
        """Share of the cells of classes with examples that are not zero."""
        return cast(Codes, self.memory_).fill(self.state_)

    def _shares(self, ballot: Ballot) -> Array:
        if self.cells == "bits":
            return super()._shares(ballot)
        logs = ballot.votes * (np.log(2.0) / 256.0) - 1e-7 * self._order()  # of equal ones, the lowest slot
        return np.where(ballot.valid, logs, -np.inf)

    def _memory(self, classes: int, features: int, codebook: npt.NDArray[Any]) -> Codes:
        return Codes(codebook, classes, parts_of(self.parts, features), self.bits, self.metric, self.cells)

    def _codebook(self, levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self.codebook not in ("random", "kmeans"):
            raise OptionError(f"codebook is {self.codebook!r}; {close_to(str(self.codebook), ('random', 'kmeans'))}")
        if not isinstance(self.words, (int, np.integer)) or self.words < 1:
            raise OptionError(f"words is {self.words!r}; it must be a positive integer")
        features = levels.shape[1]
        parts = parts_of(self.parts, features)
        if not isinstance(parts, (int, np.integer)) or not 1 <= parts <= features:
            raise OptionError(f"parts is {self.parts!r}; it must be None or 1..{features}, the number of features")
        words, rng = min(self.words, len(levels)), np.random.default_rng(self.seed)
        book, ends = np.empty((words, features), np.uint8), bounds(features, parts)
        for p in range(parts):
            part = slice(ends[p], ends[p + 1])
            book[:, part] = levels[rng.choice(len(levels), words, replace=False)][:, part]
            if self.codebook == "kmeans":
                book[:, part] = k_means(levels[:, part], book[:, part])
        return book


def k_means(x_nd: npt.NDArray[np.uint8], start: npt.NDArray[np.uint8], rounds: int = 20) -> npt.NDArray[np.uint8]:
    """Return K centres of levels (n, d) after some rounds of Lloyd's algorithm from `start` (K, d); empty ones stay.

    >>> k_means(np.array([[0], [2], [200], [202]], np.uint8), np.array([[0], [200]], np.uint8))
    array([[  1],
           [201]], dtype=uint8)
    """
    centres, x = start.astype(np.float64), x_nd.astype(np.float64)
    for _ in range(rounds):
        away = (centres * centres).sum(axis=1) - 2.0 * (x @ centres.T)
        member = (away.argmin(axis=1)[:, None] == np.arange(len(centres))).astype(np.float64)
        counts = member.sum(axis=0)
        centres = np.where(counts[:, None] > 0, (member.T @ x) / np.maximum(counts, 1.0)[:, None], centres)
    return np.floor(centres + 0.5).astype(np.uint8)


def _tuples(knobs: dict[str, Any]) -> dict[str, Any]:
    """Return knobs read from JSON with tuples where there are lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}
