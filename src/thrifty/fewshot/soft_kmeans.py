"""Soft k-means: transductive labels, in which the queries of one call help each other."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.classifier import FewShotClassifier, Labels, given_mean, softmax, squared_distances
from thrifty.fewshot.preprocess import Array, OptionError, check_letters, preprocess

_WHY = "transductive: the queries of one call are labelled together, so a subset of them may get other answers"


class SoftKMeans(FewShotClassifier):
    """Label queries together: class means drift toward the queries that they attract.

    Start from the means of the shots. Repeat: weight_qc = softmax over c of -sharpness |q - m_c|^2;
    m_c = (sum of shots + sum_q weight_qc q) / (shots + sum_q weight_qc). It assumes that queries come from all
    classes in about equal numbers. With preprocess="ME" the centre is that of the shots and queries of the call,
    unless base_mean is given.

    Source: the transductive classifier of EASY (Bendou et al. 2022, arXiv:2201.09699), its code; soft k-means with
    shots is Ren et al. 2018, eq. 3-4 (arXiv:1803.00676).

    Raises OptionError and InputError.

    >>> shots, queries = [[0.0, 1.0], [1.0, 0.0]], [[0.1, 1.0], [0.2, 1.1], [1.0, 0.2]]
    >>> SoftKMeans().fit(shots, ["up", "right"]).predict(queries)
    array(['up', 'up', 'right'], dtype='<U5')
    """

    declared_failures: ClassVar[dict[str, str]] = {
        "check_methods_subset_invariance": _WHY,
    }
    classes_: Labels
    support_: Array  # (n, d) the shots, as given
    index_: npt.NDArray[np.intp]  # (n,) their classes

    def __init__(
        self,
        sharpness: float = 5.0,  # T of EASY: how hard the weights are; 0 uniform, inf hard k-means
        iterations: int = 30,  # updates of the means; 0 is the nearest class mean
        *,
        preprocess: str = "ME",  # letters of thrifty.fewshot.preprocess
        base_mean: npt.ArrayLike | None = None,  # what 'M' subtracts (d,); None: the mean of the call's own features
    ) -> None:
        self.sharpness = sharpness
        self.iterations = iterations
        self.preprocess = preprocess
        self.base_mean = base_mean

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> SoftKMeans:
        """Keep the shots X (n, d) with labels y (n,)."""
        check_letters(self.preprocess)
        if not isinstance(self.sharpness, (int, float)) or not self.sharpness >= 0:
            raise OptionError(f"sharpness is {self.sharpness!r}; it must be at least 0 (inf: hard k-means)")
        if not isinstance(self.iterations, (int, np.integer)) or self.iterations < 0:
            raise OptionError(f"iterations is {self.iterations!r}; it must be a whole number, at least 0")
        self.support_, y_n = self._support(X, y)
        self.classes_, self.index_ = np.unique(y_n, return_inverse=True)
        if self.base_mean is not None:
            given_mean(self.base_mean, self.support_.shape[1])
        return self

    def transduce(self, X: npt.ArrayLike) -> tuple[Array, Array]:
        """Return the weights (n, C) of the queries X (n, d) and the class means (C, d) after the last update."""
        away, means = self._run(self._queries(X))
        return softmax(self._logits(away)), means

    def _scores(self, x_nd: Array) -> Array:
        away, _ = self._run(x_nd)
        return self._logits(away)

    def predict(self, X: npt.ArrayLike) -> Labels:
        """Return the label of each query: that of the nearest mean after the last update; X: (n, d)."""
        away, _ = self._run(self._queries(X))
        labels: Labels = self.classes_[away.argmin(axis=1)]
        return labels

    def _logits(self, away: Array) -> Array:
        away = away - away.min(axis=1, keepdims=True)
        if np.isinf(self.sharpness):
            logits: Array = np.where(away == 0, 0.0, -np.inf)
            return logits
        return -self.sharpness * away

    def _run(self, x_nd: Array) -> tuple[Array, Array]:
        shots, queries = self._both(x_nd)
        member = np.eye(len(self.classes_))[self.index_]
        sums, counts = member.T @ shots, member.sum(axis=0)
        means = sums / counts[:, None]
        for _ in range(self.iterations):
            weights = softmax(self._logits(squared_distances(queries, means)))
            means = (sums + weights.T @ queries) / (counts + weights.sum(axis=0))[:, None]
        return squared_distances(queries, means), means

    def _both(self, x_nd: Array) -> tuple[Array, Array]:
        """Return the preprocessed shots and queries."""
        mean = None
        if "M" in self.preprocess:
            if self.base_mean is None:
                before = self.preprocess.split("M", maxsplit=1)[0]
                mean = preprocess(np.concatenate([self.support_, x_nd]), before).mean(axis=0)
            else:
                mean = given_mean(self.base_mean, x_nd.shape[1])
        return preprocess(self.support_, self.preprocess, mean), preprocess(x_nd, self.preprocess, mean)
