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
BLOCK = 512  # queries compared with all shots at once
STRANGENESS = ("nearest", "distance", "margin")


class WithUnknown(Preprocessed):
    """Any classifier, with the answer "unknown" for queries that are strange next to the shots.

    The strangeness of a query is, for "nearest", its distance to the nearest shot over its average distance to all
    shots; for "distance", its squared distance to the nearest class mean over 1 + 1/shots of that class (the noise of
    the mean); for "margin", how little the classifier's best score is above its second. It is compared with the
    strangeness of each shot that takes no part in what judges it (leave-one-out; for "nearest", among the other shots
    and the query). The p-value of a query is (1 + shots at least as strange) / (1 + shots); it is unknown when the
    p-value is at most `rate`.

    So at most about `rate` of the queries *of the known classes* are called unknown, on average over supports, when
    classes are about equally spread and queries come from them in proportion to their shots. How many unknown
    things are found depends on how far away they are; nothing promises it. "nearest" was the best of the three on
    most real features tried, "distance" is on classes that are round clouds; "margin" is about queries between two
    classes, and blind to what is far and on one side.

    For "distance" and "margin", a class with one shot has no leave-one-out, and the two shots of a class with two are
    each other's mirror image and count half each. There must be enough shots: at least 1/rate - 1.

    Source: conformal p-values, Vovk, Gammerman & Shafer 2005, Algorithmic Learning in a Random World, ch. 2; the
    distance to a near neighbour for what is out of distribution, Sun et al. 2022 (arXiv:2204.06507).

    Raises OptionError and InputError.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((40, 8)) + 9.0 * np.repeat(np.eye(2, 8), 20, axis=0)
    >>> model = WithUnknown(rate=0.05).fit(x, ["a"] * 20 + ["b"] * 20)
    >>> model.predict([x[0], 50.0 * np.ones(8)])
    array(['a', 'unknown'], dtype='<U7')
    """

    # Answers outside classes_ are the point of this estimator; scikit-learn's checks do not allow for them.
    declared_failures: ClassVar[dict[str, str]] = {
        "check_classifiers_one_label": "expects the one label on every query, however strange",
    }
    classes_: Labels  # (C,) the known classes, sorted
    estimator_: Any  # the classifier, fitted
    calibration_: Array  # (m,) strangeness of the shots, ascending
    weights_: Array  # (m,) how much each of them counts: 1, or 1/2 in a class of two

    def __init__(
        self,
        estimator: Any = None,  # any scikit-learn classifier; None: NearestClassMean()
        rate: float = 0.05,  # share of queries of known classes that may be called unknown
        *,
        strangeness: str = "nearest",  # one of STRANGENESS
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
        if (self.classes_ == self.unknown).any():
            raise InputError(f"a class is called {self.unknown!r}, which is the answer for unknown; give unknown=...")
        self._counts = np.bincount(index)
        self._shots = self._prepared(x_nd)
        self._means = np.stack([self._shots[index == c].mean(axis=0) for c in range(len(self.classes_))])
        values, weights = self._left_out(x_nd, y_n, index)
        order = np.argsort(values, kind="stable")
        order = order[weights[order] > 0]
        self.calibration_, self.weights_ = values[order], weights[order]
        self._refuse_few()
        return self

    def strangenesses(self, X: npt.ArrayLike) -> Array:
        """Return how strange each query is (n,); X: (n, d)."""
        return self._strange(self._queries(X))

    def p_values(self, X: npt.ArrayLike) -> Array:
        """Return the conformal p-value of each query (n,): small for what is unlike the known classes."""
        return self._p_values(self._queries(X))

    def predict(self, X: npt.ArrayLike) -> Labels:
        """Return the label of each query (n,), or `unknown`."""
        x_nd = self._queries(X)
        labels = np.asarray(self.estimator_.predict(x_nd))
        return self._answers(labels, self._p_values(x_nd) <= self.rate + 1e-12)

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

    def _p_values(self, x_nd: Array) -> Array:
        if self.strangeness == "nearest":
            return np.concatenate([self._p_of_nearest(x_nd[i : i + BLOCK]) for i in range(0, len(x_nd), BLOCK)])
        tail = np.append(self.weights_[::-1].cumsum()[::-1], 0.0)  # (m + 1,) weight of the shots from each rank on
        at_least = tail[np.searchsorted(self.calibration_, self._strange(x_nd), side="left")]
        result: Array = (1.0 + at_least) / (1.0 + self.weights_.sum())
        return result

    def _p_of_nearest(self, x_nd: Array) -> Array:
        """Return the p-values of queries, each among the shots: query and shots see the same number of others."""
        away = np.sqrt(squared_distances(self._prepared(x_nd), self._shots))  # (q, n)
        count = len(self._shots)
        own = _share(away.min(axis=1), away.sum(axis=1), count)
        shots = _share(np.minimum(self._nearest, away), self._sums + away, count)
        at_least = (shots >= own[:, None] * (1 - 1e-12)).sum(axis=1)
        result: Array = (1.0 + at_least) / (1.0 + count)
        return result

    def _strange(self, x_nd: Array) -> Array:
        if self.strangeness == "margin":
            return -_margins(self.estimator_, x_nd)
        prepared = self._prepared(x_nd)
        if self.strangeness == "nearest":
            away = np.sqrt(squared_distances(prepared, self._shots))
            return _share(away.min(axis=1), away.sum(axis=1), len(self._shots))
        result: Array = (squared_distances(prepared, self._means) / (1.0 + 1.0 / self._counts)).min(axis=1)
        return result

    def _left_out(self, x_nd: Array, y_n: Labels, index: npt.NDArray[np.intp]) -> tuple[Array, Array]:
        """Return the strangeness of each shot left out (n,), and how much it counts (n,)."""
        if self.strangeness == "nearest":
            away = np.sqrt(squared_distances(self._shots, self._shots))
            np.fill_diagonal(away, 0.0)
            self._sums = away.sum(axis=1)
            np.fill_diagonal(away, np.inf)
            self._nearest = away.min(axis=1)
            nearest = np.where(np.isinf(self._nearest), 0.0, self._nearest)
            return _share(nearest, self._sums, max(len(x_nd) - 1, 1)), np.ones(len(x_nd))
        counts = self._counts[index]
        weights = np.where(counts == 1, 0.0, np.where(counts == 2, 0.5, 1.0))
        if self.strangeness == "margin":
            return self._left_out_margins(x_nd, y_n), weights
        return self._left_out_distances(index), weights

    def _left_out_distances(self, index: npt.NDArray[np.intp]) -> Array:
        """Return the strangeness (n,) of each shot to the means without it.

        Without x, the mean of its k shots moves so that |x - mean|^2 grows by (k / (k - 1))^2; over the noise
        1 + 1/(k - 1) of a mean of k - 1 shots that is k / (k - 1).
        """
        counts = self._counts
        away = squared_distances(self._shots, self._means)
        rows = np.arange(len(away))
        own = away[rows, index] * (counts / np.maximum(counts - 1.0, 1.0))[index]
        away = away / (1.0 + 1.0 / counts)
        away[rows, index] = own
        result: Array = away.min(axis=1)
        return result

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

    def _refuse_few(self) -> None:
        weight = float(self.weights_.sum())
        if self.rate * (1.0 + weight) < 1.0 - 1e-9:
            least = math.ceil(1 / self.rate - 1e-9) - 1
            what = (
                f"add shots, or give rate={math.ceil(1000 / (weight + 1)) / 1000:g} or more" if weight else "add shots"
            )
            which = "" if self.strangeness == "nearest" else " whose class has others (each of a pair counts half)"
            raise InputError(
                f"a rate of {self.rate:g} needs {least} shots{which}; there are {weight:g} "
                f"(n_samples={int(self._counts.sum())}): {what}"
            )


def _share(nearest: Array, sums: Array, count: int) -> Array:
    """Return the nearest distance over the average one; 0 where all are 0."""
    result: Array = nearest * count / np.where(sums > 0, sums, 1.0)
    return result


def _margins(estimator: Any, x_nd: Array) -> Array:
    """Return the best score minus the second (n,)."""
    scores = np.asarray(estimator.decision_function(x_nd), np.float64)
    if scores.ndim == 1:  # two classes: the difference of their scores
        return np.abs(scores)
    top = np.sort(scores, axis=1)
    result: Array = top[:, -1] - top[:, -2]
    return result
