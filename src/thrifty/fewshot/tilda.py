"""TILDA: incremental learning with a few running means per class and sub-space, votes, and augmented views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.associative import Ballot, bounds
from thrifty.associative.anchors import mixed
from thrifty.errors import StoreError, close_to
from thrifty.fewshot import saved
from thrifty.fewshot.classifier import Labels, squared_distances
from thrifty.fewshot.preprocess import Array, InputError, OptionError
from thrifty.fewshot.voting import Footprint, VotingClassifier, kind_of, parts_of

POLICIES = ("balanced", "random", "nearest")
VOTES = ("flat", "two_level")
MIXINGS = ("none", "permutation", "rotation")
VERSION = 1
AT_A_TIME = 1 << 22  # distances held at once


class Tilda(VotingClassifier):
    """Learn examples and classes as they come: per class and sub-space a few anchors, which are running means.

    The features are split into `parts` consecutive sub-vectors. Learning an example of class c moves, in each
    sub-space p, one of the class's anchors, chosen by `policy`: n += 1, A += (x_p - A) / n. A query votes, in each
    sub-space, for the class of the nearest anchor (Euclidean; unused anchors take no part); the votes of all
    sub-spaces, and of all views when X is (n, R, d), are counted. Ties: the smaller sum of the distances to the
    class's nearest anchors, then the first class. Anchors change only with examples of their class, so nothing is
    forgotten, and there may be new classes at any time; a class without examples is never predicted.

    Limit cases: parts=1, anchors=1 is the nearest class mean; parts=1 and anchors as many as examples is 1-NN.

    Source: Transfer Incremental Learning using Data Augmentation, arXiv:1810.02020. The paper's own numbers of anchors
    and sub-spaces, its assignment rule and whether its votes are flat were not available; the options and defaults
    here are this project's.

    Raises OptionError (a KnobError and a ValueError) and InputError (a DataError and a ValueError).

    >>> model = Tilda(anchors=1).partial_fit([[0.0, 0.0]], ["low"]).partial_fit([[2.0, 2.0]], ["high"])
    >>> model.predict([[1.7, 1.9]])
    array(['high'], dtype='<U4')
    """

    classes_: Labels  # (C,) sorted
    anchors_: Array  # (C, anchors, d) running means of mixed features
    counts_: npt.NDArray[np.int64]  # (C, parts, anchors) examples of each
    mixing_: npt.NDArray[Any] | None  # what the features go through first: a permutation (d,) or a rotation (d, d)
    seen_: int  # examples learned, all classes

    def __init__(
        self,
        parts: int | None = None,  # sub-spaces P; None: 16, but at least four features in each
        anchors: int = 4,  # kA, per class and sub-space; 1 when there are fewer than about ten examples per class
        *,
        policy: str = "balanced",  # of POLICIES: the least used anchor, one at random, or the nearest (empty first)
        vote: str = "flat",  # of VOTES: all votes of all views at once, or a winner per view first
        mixing: str = "none",  # of MIXINGS: shuffle or rotate the features before the split, fixed by the seed
        dtype: str = "float64",  # of the anchors: "float64" or "float32"
        seed: int = 0,  # of the random policy and of mixing
    ) -> None:
        self.parts = parts
        self.anchors = anchors
        self.policy = policy
        self.vote = vote
        self.mixing = mixing
        self.dtype = dtype
        self.seed = seed

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Tilda:
        """Forget everything, then learn the examples X (n, d) or (n, R, d) with labels y (n,), in their order."""
        x_nd, y_n = self._examples(X, y, reset=True)
        self._start(x_nd.shape[1])
        self._learn(x_nd, y_n)
        return self

    def partial_fit(self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> Tilda:
        """Learn more examples; new labels become new classes.

        X: (n, d) or (n, R, d). y: (n,). classes: labels that will come later; until they do, they are never predicted.
        """
        first = not hasattr(self, "classes_")
        x_nd, y_n = self._examples(X, y, reset=first)
        if first:
            self._start(x_nd.shape[1])
        if classes is not None:
            self._welcome(np.unique(np.asarray(classes)))
        self._learn(x_nd, y_n)
        return self

    @property
    def footprint_(self) -> Footprint:
        """Bytes and operations, counted: memory anchors times that of nearest class mean, independent of parts."""
        classes, anchors, d = self.anchors_.shape
        constant = 0 if self.mixing_ is None else self.mixing_.nbytes
        mixing = 2 * d * d if self.mixing == "rotation" else 0
        nearest = 3 * anchors * d if self.policy == "nearest" else 0
        return Footprint(
            state_bytes=self.anchors_.nbytes + 4 * self.counts_.size,  # counters are kept and saved as 32 bits
            constant_bytes=constant,
            learn_operations=mixing + nearest + 3 * d,
            predict_operations=mixing + 3 * classes * anchors * d,
        )

    def save(self, path: str | Path) -> Path:
        """Write the fitted estimator to one safetensors file (temporary, then renamed) and return its path."""
        content = {
            "knobs": self.get_params(),
            "classes": saved.labels_out(self.classes_),
            "features": self.n_features_in_,
            "names": getattr(self, "feature_names_in_", np.empty(0)).tolist(),
            "seen": self.seen_,
        }
        arrays: dict[str, Any] = {"anchors": self.anchors_, "counts": self.counts_.astype(np.uint32)}
        arrays["mixing"] = np.zeros(0, np.float64) if self.mixing_ is None else self.mixing_
        return saved.write(path, "Tilda", VERSION, content, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Tilda:
        """Read what `save` wrote. Raises StoreError when anything is missing, more, or of another shape."""
        content, arrays = saved.read(path, "Tilda", VERSION, frozenset({"anchors", "counts", "mixing"}))
        try:
            new = cls(**content["knobs"])
            new.n_features_in_ = int(content["features"])
            if content["names"]:
                new.feature_names_in_ = np.array(content["names"], dtype=object)
            new._start(new.n_features_in_)
            new.classes_, new.seen_ = saved.labels_in(content["classes"]), int(content["seen"])
        except (KeyError, TypeError, ValueError) as err:
            raise StoreError(f"{path} does not describe a Tilda: {err}") from err
        parts = parts_of(new.parts, new.n_features_in_)
        shapes = {
            "anchors": (len(new.classes_), new.anchors, new.n_features_in_),
            "counts": (len(new.classes_), parts, new.anchors),
            "mixing": (0,) if new.mixing_ is None else new.mixing_.shape,
        }
        if wrong := [f"{k} {arrays[k].shape}, not {shape}" for k, shape in shapes.items() if arrays[k].shape != shape]:
            raise StoreError(f"{path} does not fit its own description: {'; '.join(wrong)}")
        new.anchors_, new.counts_ = arrays["anchors"], arrays["counts"].astype(np.int64)
        new.mixing_ = None if new.mixing_ is None else arrays["mixing"]
        return new

    # ---- learning

    def _start(self, features: int) -> None:
        self._check_knobs(features)
        rng = np.random.default_rng(self.seed)
        self.mixing_ = None
        if self.mixing == "permutation":
            self.mixing_ = rng.permutation(features)
        elif self.mixing == "rotation":
            q, r = np.linalg.qr(rng.standard_normal((features, features)))
            self.mixing_ = q * np.sign(np.diag(r))
        self.classes_ = np.empty(0)
        self.anchors_ = np.zeros((0, self.anchors, features), self.dtype)
        self.counts_ = np.zeros((0, parts_of(self.parts, features), self.anchors), np.int64)
        self.seen_ = 0

    def _check_knobs(self, features: int) -> None:
        bad = [
            f"{name} is {getattr(self, name)!r}; {close_to(str(getattr(self, name)), known)}"
            for name, known in (
                ("policy", POLICIES), ("vote", VOTES), ("mixing", MIXINGS), ("dtype", ("float64", "float32")),
            )
            if getattr(self, name) not in known
        ]  # fmt: skip
        parts = parts_of(self.parts, features)
        if not isinstance(parts, (int, np.integer)) or not 1 <= parts <= features:
            bad.append(f"parts is {self.parts!r}; it must be None or 1..{features}, the number of features")
        if not isinstance(self.anchors, (int, np.integer)) or self.anchors < 1:
            bad.append(f"anchors is {self.anchors!r}; it must be a positive integer")
        if not isinstance(self.seed, (int, np.integer)) or not 0 <= self.seed < 1 << 32:
            bad.append(f"seed is {self.seed!r}; it must be an integer 0..2^32 - 1")
        if bad:
            raise OptionError("; ".join(bad))

    def _welcome(self, labels: Labels) -> None:
        """Make room for labels that are new, keeping classes sorted and all words of the old ones."""
        if len(self.classes_) and kind_of(labels) != kind_of(self.classes_):
            raise InputError(f"labels are {labels.dtype}, but the classes known so far are {self.classes_.dtype}")
        merged: Labels = np.union1d(self.classes_, labels) if len(self.classes_) else labels
        place = np.searchsorted(merged, self.classes_) if len(self.classes_) else np.zeros(0, np.intp)
        anchors = np.zeros((len(merged), *self.anchors_.shape[1:]), self.anchors_.dtype)
        counts = np.zeros((len(merged), *self.counts_.shape[1:]), np.int64)
        anchors[place], counts[place] = self.anchors_, self.counts_
        self.classes_, self.anchors_, self.counts_ = merged, anchors, counts

    def _learn(self, x_nd: Array, y_n: Labels) -> None:
        x_nd = self._mixed(x_nd)
        labels, index = np.unique(y_n, return_inverse=True)
        self._welcome(labels)
        number = self.seen_ + np.arange(len(x_nd))
        for i, c in enumerate(np.searchsorted(self.classes_, labels)):
            rows = index == i
            if self.policy == "nearest":
                for x in x_nd[rows]:
                    self._add(int(c), x[None], self._nearest(int(c), x)[None])
            else:
                self._add(int(c), x_nd[rows], self._choice(int(c), number[rows]))
        self.seen_ += len(x_nd)

    def _choice(self, c: int, number: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the anchor of each sub-space for each of the next examples of a class (n, P), given their numbers."""
        parts = self.counts_.shape[1]
        if self.policy == "balanced":  # taking turns keeps the counts within one of each other
            turn = int(self.counts_[c, 0].sum()) + np.arange(len(number))
            return np.repeat((turn % self.anchors)[:, None], parts, axis=1)
        counter = (number[:, None] * parts + np.arange(parts)).astype(np.uint64)
        high = mixed((counter >> np.uint64(32)).astype(np.uint32), int(self.seed) ^ 0x5BD1E995)
        bits = mixed(counter.astype(np.uint32), int(self.seed)) ^ high
        scaled = bits.astype(np.uint64) * np.uint64(self.anchors)
        chosen: npt.NDArray[np.int64] = np.asarray(scaled >> np.uint64(32), np.int64)
        return chosen

    def _nearest(self, c: int, x_d: Array) -> npt.NDArray[np.int64]:
        """Return the first empty anchor of each sub-space, or the nearest one (P,)."""
        away = (self.anchors_[c].astype(np.float64) - x_d) ** 2
        ends = bounds(x_d.size, self.counts_.shape[1])
        sums = np.add.reduceat(away, ends[:-1], axis=1).T  # (P, anchors)
        nearest: npt.NDArray[np.int64] = np.where(self.counts_[c] == 0, -1.0, sums).argmin(axis=1)
        return nearest

    def _add(self, c: int, x_nd: Array, chosen: npt.NDArray[np.int64]) -> None:
        """Move the chosen anchors (n, P) of a class to the means of what they had and the examples (n, d)."""
        ends = bounds(x_nd.shape[1], chosen.shape[1])
        for p in range(chosen.shape[1]):
            part = slice(ends[p], ends[p + 1])
            member = (chosen[:, p, None] == np.arange(self.anchors)).astype(np.float64)  # (n, anchors)
            more = member.sum(axis=0)
            total = self.counts_[c, p] + more
            old = self.anchors_[c, :, part].astype(np.float64)
            step = (member.T @ x_nd[:, part] - more[:, None] * old) / np.maximum(total, 1.0)[:, None]
            self.anchors_[c, :, part] = old + step
            self.counts_[c, p] = total.astype(np.int64)

    # ---- predicting

    def _mixed(self, x_nd: Array) -> Array:
        if self.mixing_ is None:
            return x_nd
        result: Array = x_nd[:, self.mixing_] if self.mixing_.ndim == 1 else x_nd @ self.mixing_
        return result

    def _ballot(self, x_nd: Array) -> Ballot:
        x_nd = self._mixed(x_nd)
        used: npt.NDArray[np.bool_] = self.counts_ > 0  # (C, P, anchors)
        valid = np.asarray(used.any(axis=(1, 2)))
        votes = np.zeros((len(x_nd), len(self.classes_)), np.int64)
        ties = np.zeros(votes.shape)
        ends = bounds(x_nd.shape[1], used.shape[1])
        step = max(1, AT_A_TIME // max(1, len(valid) * self.anchors))
        for start in range(0, len(x_nd), step):
            rows = slice(start, start + step)
            for p in range(used.shape[1]):
                part = slice(ends[p], ends[p + 1])
                least = self._least(x_nd[rows, part], self.anchors_[:, :, part], used[:, p])
                votes[rows][np.arange(len(least)), least.argmin(axis=1)] += 1
                ties[rows] += np.where(valid, least, 0.0)
        return (
            self._winners_only(Ballot(votes, ties, valid)) if self.vote == "two_level" else Ballot(votes, ties, valid)
        )

    @staticmethod
    def _least(x_nd: Array, anchors: Array, used: npt.NDArray[np.bool_]) -> Array:
        """Return the squared distance of each query to the nearest used anchor of each class (n, C)."""
        away = np.full((len(x_nd), *used.shape), np.inf)
        away[:, used] = squared_distances(x_nd, anchors[used].astype(np.float64))
        least: Array = away.min(axis=2)
        return least

    @staticmethod
    def _winners_only(ballot: Ballot) -> Ballot:
        """Return one vote per view, for the class that wins it."""
        single = np.zeros_like(ballot.votes)
        single[np.arange(len(single)), ballot.winners()] = 1
        return Ballot(single, ballot.ties, ballot.valid)
