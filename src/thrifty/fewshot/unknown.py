"""Saying "unknown": a query that is farther from every class than shots are from their own is not labelled."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thrifty.errors import close_to, need
from thrifty.fewshot.classifier import Labels, Preprocessed, squared_distances
from thrifty.fewshot.nearest_class_mean import NearestClassMean
from thrifty.fewshot.preprocess import Array, InputError, OptionError
from thrifty.fewshot.soft_kmeans import SoftKMeans

_base = need("sklearn.base", extra="fewshot")

UNKNOWN = "unknown"
STRANGENESS = ("distance", "relative", "margin")


class WithUnknown(Preprocessed):
    """Any classifier, with the answer "unknown" for queries that are strange next to the shots.

    The strangeness of a query is, for "distance", its squared distance to the nearest class mean over 1 + 1/shots
    of that class (the noise of the mean); for "relative", the same over the average distance to all means; for
    "margin", how little the classifier's best score is above its second.
    It is compared with the strangeness of each shot that takes no part in the mean, or the classifier, that judges
    it (leave-one-out). The p-value of a query is (1 + shots at least as strange) / (1 + shots); it is unknown when
    the p-value is at most `rate`.

    So `rate` is the share of queries *of the known classes* that are called unknown, on average over supports, when
    classes are about equally spread and queries come from them in proportion to their shots. How many unknown
    things are found depends on how far away they are; nothing promises it. "distance" is about queries that are far
    from everything; "relative" also allows for pictures that are far from everything by their nature, and needs two
    classes; "margin" is about those between two classes, and blind to what is far and on one side.

    A class with one shot has no leave-one-out; the two shots of a class with two are each other's mirror image and
    count half each ("relative" then rejects fewer than it may). There must be enough of the rest: at least 1/rate - 1.

    Source: conformal p-values, Vovk, Gammerman & Shafer 2005, Algorithmic Learning in a Random World, ch. 2, with
    leave-one-out in the place of a calibration set.

    Raises OptionError and InputError.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((40, 8)) + 9.0 * np.repeat(np.eye(2, 8), 20, axis=0)
    >>> model = WithUnknown(rate=0.05).fit(x, ["a"] * 20 + ["b"] * 20)
    >>> model.predict([x[0], 50.0 * np.ones(8)])
    array(['a', 'unknown'], dtype='<U7')
    """

    # Answers outside classes_ are the point of this estimator; scikit-learn's checks do not allow for them.
    declared_failures: ClassVar[dict[str, str]] = {
        "check_classifiers_classes": "expects every answer to be one of classes_",
        "check_classifiers_train": "expects the label of the best score, and an accuracy without rejections",
    }
    classes_: Labels  # (C,) the known classes, sorted
    estimator_: Any  # the classifier, fitted
    calibration_: Array  # (m,) strangeness of the shots, ascending
    weights_: Array  # (m,) how much each of them counts: 1, or 1/2 in a class of two
    threshold_: float  # a query above it is unknown

    def __init__(
        self,
        estimator: Any = None,  # any scikit-learn classifier; None: NearestClassMean()
        rate: float = 0.05,  # share of queries of known classes that may be called unknown
        *,
        strangeness: str = "distance",  # one of STRANGENESS
        unknown: Any = UNKNOWN,  # what is answered; give a number where labels are numbers, such as -1
        preprocess: str = "",  # letters of thrifty.fewshot.preprocess, before distances
        base_mean: npt.ArrayLike | str | None = None,  # what 'M' subtracts: (d,), or "support"
    ) -> None:
        self.estimator = estimator
        self.rate = rate
        self.strangeness = strangeness
        self.unknown = unknown
        self.preprocess = preprocess
        self.base_mean = base_mean

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> WithUnknown:
        """Fit the classifier on the shots X (n, d), y (n,), and learn how strange they are to each other."""
        self._check_knobs()
        x_nd, y_n = self._support(X, y)
        self._learn_mean(x_nd)
        inner = NearestClassMean() if self.estimator is None else self.estimator
        self.estimator_ = _base.clone(inner).fit(x_nd, y_n)
        self.classes_, index = np.unique(y_n, return_inverse=True)
        if self.strangeness == "relative" and len(self.classes_) < 2:
            raise InputError("strangeness='relative' compares classes, and there is 1 class; use 'distance'")
        if (self.classes_ == self.unknown).any():
            raise InputError(f"a class is called {self.unknown!r}, which is the answer for unknown; give unknown=...")
        prepared = self._prepared(x_nd)
        self._counts = np.bincount(index)
        self._means = np.stack([prepared[index == c].mean(axis=0) for c in range(len(self.classes_))])
        if self.strangeness == "margin":
            values = self._left_out_margins(x_nd, y_n)
        else:
            values = self._of_distances(self._left_out_distances(prepared, index))
        counts = self._counts[index]
        order = np.argsort(values, kind="stable")
        order = order[counts[order] > 1]
        self.calibration_ = values[order]
        self.weights_ = np.where(counts[order] == 2, 0.5, 1.0)
        self.threshold_ = self._threshold()
        return self

    def strangenesses(self, X: npt.ArrayLike) -> Array:
        """Return how strange each query is (n,); X: (n, d)."""
        return self._strange(self._queries(X))

    def p_values(self, X: npt.ArrayLike) -> Array:
        """Return the conformal p-value of each query (n,): small for what is unlike the known classes."""
        strange = self.strangenesses(X)
        tail = self._tail()[np.searchsorted(self.calibration_, strange, side="left")]
        result: Array = (1.0 + tail) / (1.0 + self.weights_.sum())
        return result

    def predict(self, X: npt.ArrayLike) -> Labels:
        """Return the label of each query (n,), or `unknown`."""
        x_nd = self._queries(X)
        labels = np.asarray(self.estimator_.predict(x_nd))
        return self._answers(labels, self._strange(x_nd) > self.threshold_)

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return the classifier's probabilities (n, C) of `classes_`, as if every query were of one of them."""
        x_nd = self._queries(X)
        result: Array = self.estimator_.predict_proba(x_nd)
        return result

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Return the classifier's scores of `classes_`, as if every query were of one of them."""
        x_nd = self._queries(X)
        result: Array = self.estimator_.decision_function(x_nd)
        return result

    def _answers(self, labels: Labels, reject: npt.NDArray[np.bool_]) -> Labels:
        word = np.asarray(self.unknown)
        text = {labels.dtype.kind, word.dtype.kind} <= set("US")
        number = {labels.dtype.kind, word.dtype.kind} <= set("iufb")
        kind: Any = np.result_type(labels, word) if text or number else object
        answers = labels.astype(kind)
        answers[reject] = self.unknown
        return answers

    def _check_knobs(self) -> None:
        number = isinstance(self.rate, (int, float, np.floating)) and not isinstance(self.rate, bool)
        if not number or not 0 < self.rate < 1:
            raise OptionError(f"rate is {self.rate!r}; it is the share of known queries to reject, in (0, 1)")
        if self.strangeness not in STRANGENESS:
            raise OptionError(f"strangeness is {self.strangeness!r}; {close_to(str(self.strangeness), STRANGENESS)}")
        if self.strangeness == "margin" and isinstance(self.estimator, SoftKMeans):
            raise OptionError("SoftKMeans labels queries together, so leave-one-out margins say nothing of them; use "
                              "strangeness='distance'")  # fmt: skip

    def _strange(self, x_nd: Array) -> Array:
        if self.strangeness == "margin":
            return -_margins(self.estimator_, x_nd)
        away = squared_distances(self._prepared(x_nd), self._means)
        return self._of_distances(away / (1.0 + 1.0 / self._counts))

    def _of_distances(self, away: Array) -> Array:
        """Return how strange queries with these distances (n, C) are."""
        nearest: Array = away.min(axis=1)
        if self.strangeness == "relative":
            average = away.mean(axis=1)
            nearest = nearest / np.where(average > 0, average, 1.0)
        return nearest

    def _left_out_distances(self, x_nd: Array, index: npt.NDArray[np.intp]) -> Array:
        """Return the distances (n, C) of each shot to the means without it; to itself where it is the only one.

        Without x, the mean of its k shots moves so that |x - mean|^2 grows by (k / (k - 1))^2; over the noise
        1 + 1/(k - 1) of a mean of k - 1 shots that is k / (k - 1).
        """
        counts = self._counts
        away = squared_distances(x_nd, self._means)
        rows = np.arange(len(x_nd))
        own = away[rows, index] * (counts / np.maximum(counts - 1.0, 1.0))[index]
        away = away / (1.0 + 1.0 / counts)
        away[rows, index] = own
        return away

    def _left_out_margins(self, x_nd: Array, y_n: Labels) -> Array:
        """Return the strangeness (n,) of each shot to the classifier fitted without it."""
        found = np.zeros(len(x_nd))
        _, index = np.unique(y_n, return_inverse=True)
        if (self._counts[index] > 1).sum() == 0 or len(self.classes_) < 2:
            return found
        for i in range(len(x_nd)):
            if self._counts[index[i]] > 1:
                rest = np.arange(len(x_nd)) != i
                found[i] = -_margins(_base.clone(self.estimator_).fit(x_nd[rest], y_n[rest]), x_nd[i : i + 1])[0]
        return found

    def _tail(self) -> Array:
        """Return the weight of the shots from each rank on (m + 1,)."""
        found: Array = np.append(self.weights_[::-1].cumsum()[::-1], 0.0)
        return found

    def _threshold(self) -> float:
        weight = float(self.weights_.sum())
        allowed = self.rate * (1.0 + weight) - 1.0 + 1e-9  # weight of the shots that may be at least as strange
        if allowed < 0:
            least = math.ceil(1 / self.rate - 1e-9) - 1
            what = (
                f"add shots, or give rate={math.ceil(1000 / (weight + 1)) / 1000:g} or more" if weight else "add shots"
            )
            raise InputError(
                f"a rate of {self.rate:g} needs {least} shots whose class has others (each of a pair counts half); "
                f"there are {weight:g} (n_samples={int(self._counts.sum())}): {what}"
            )
        first = int(np.argmax(self._tail() <= allowed))
        return float(self.calibration_[first - 1]) if first else -math.inf


def _margins(estimator: Any, x_nd: Array) -> Array:
    """Return the best score minus the second (n,)."""
    scores = np.asarray(estimator.decision_function(x_nd), np.float64)
    if scores.ndim == 1:  # two classes: the difference of their scores
        return np.abs(scores)
    top = np.sort(scores, axis=1)
    result: Array = top[:, -1] - top[:, -2]
    return result
