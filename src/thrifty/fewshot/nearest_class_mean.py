"""Nearest class mean: the classifier that a handful of shots supports, one at a time if need be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import close_to
from thrifty.fewshot.classifier import Labels, Preprocessed, positive, squared_distances
from thrifty.fewshot.generalization import Forecast, GaussianModel, Offset, forecast
from thrifty.fewshot.preprocess import Array, InputError, OptionError, unit

METRICS = ("euclidean", "cosine")
PRIORS = ("uniform", "empirical")


class NearestClassMean(Preprocessed):
    """Label a query with the class of the nearest mean feature.

    The means are counted: a sum and a count per class, so that any number of `partial_fit` calls, in any order
    and chunks, gives what one `fit` gives (to the last digits of float64), nothing is forgotten, and classes may
    arrive at any time. Score of class c: log prior_c - |x - m_c|^2 / (2 v). The variance v is the pooled
    within-class variance per dimension, times 1 + 1/shots for the noise of the means; with one shot everywhere
    it is taken from the distances between shots. It shapes the probabilities, and the labels only where priors
    differ. "cosine" first scales features to unit length, and the means too: the label is that of the mean with
    the smallest angle.

    Source: Snell et al. 2017, Prototypical Networks, eq. 1-2 (arXiv:1703.05175), on frozen features; with
    preprocess="ME" and base_mean, the inductive classifier of EASY (Bendou et al. 2022, arXiv:2201.09699).

    Raises OptionError (a KnobError and a ValueError) and InputError (a DataError and a ValueError).

    >>> NearestClassMean().fit([[0.0], [2.0]], ["low", "high"]).predict([[1.7]])
    array(['high'], dtype='<U4')
    """

    classes_: Labels  # (C,) sorted
    counts_: npt.NDArray[np.int64]  # (C,) shots seen
    sums_: Array  # (C, d) sums of preprocessed shots
    scatters_: Array  # (C,) sums of squared distances of the shots to their class mean

    def __init__(
        self,
        metric: str = "euclidean",  # one of METRICS
        *,
        preprocess: str = "",  # letters of thrifty.fewshot.preprocess, e.g. "ME"
        base_mean: npt.ArrayLike | str | None = None,  # what 'M' subtracts: (d,), or "support": mean of fit's shots
        priors: npt.ArrayLike | str = "uniform",  # one of PRIORS, or (C,) numbers in the order of classes_
        variance: float | None = None,  # within-class variance per dimension; None: estimated
    ) -> None:
        self.metric = metric
        self.preprocess = preprocess
        self.base_mean = base_mean
        self.priors = priors
        self.variance = variance

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> NearestClassMean:
        """Forget everything, then learn the means of the shots X (n, d) with labels y (n,)."""
        self._check_knobs()
        x_nd, y_n = self._support(X, y)
        self._learn_mean(x_nd)
        self._start(x_nd.shape[1])
        self._count(x_nd, y_n)
        self._class_priors()
        return self

    def partial_fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None
    ) -> NearestClassMean:
        """Add shots; new labels become new classes.

        X: (n, d). y: (n,). classes: labels that will come later; until they do, they have probability 0.
        """
        first = not hasattr(self, "classes_")
        if first:
            self._check_knobs()
            if "M" in self.preprocess and isinstance(self.base_mean, str):
                raise OptionError("base_mean='support' needs all shots at once: call fit first, or give the mean (d,)")
        x_nd, y_n = self._support(X, y, reset=first)
        if first:
            self._learn_mean(x_nd)
            self._start(x_nd.shape[1])
        if classes is not None:
            self._welcome(np.unique(np.asarray(classes)))
        self._count(x_nd, y_n)
        return self

    def forecast(
        self, X: npt.ArrayLike, y: npt.ArrayLike, shots: int | None = None,
        model: GaussianModel | None = None, offset: Offset | None = None,
    ) -> Forecast:  # fmt: skip
        """Return the predicted error of this classifier fitted on X, y: `generalization.forecast` after its own
        preprocessing. For the Euclidean metric and equal priors only, which is what the forecast is about.
        """
        if self.metric != "euclidean" or not (isinstance(self.priors, str) and self.priors == "uniform"):
            raise OptionError("forecast needs metric='euclidean' and priors='uniform'; for cosine, use preprocess='E'")
        fitted = NearestClassMean(preprocess=self.preprocess, base_mean=self.base_mean).fit(X, y)
        x_nd = fitted._prepared(fitted._checked(X, reset=False))
        return forecast(x_nd, y, shots, model, offset)

    @property
    def means_(self) -> Array:
        """The class means (C, d); zeros for a class without shots."""
        means: Array = self.sums_ / np.maximum(self.counts_, 1)[:, None]
        return unit(means) if self.metric == "cosine" else means

    @property
    def variance_(self) -> float:
        """The variance v of the scores, per dimension."""
        if self.variance is not None:
            return positive("variance", self.variance)
        seen = self.counts_ > 0
        counts, means = self.counts_[seen], self.means_[seen]
        freedom = int((counts - 1).sum())
        if freedom > 0:
            within = float(self.scatters_.sum()) / (freedom * means.shape[1])
            found: float = within * (1.0 + float((1.0 / counts).mean()))
        else:  # one shot each: all of |x_i - x_j|^2 is taken for noise, 2 v per dimension
            around = ((means - means.mean(axis=0)) ** 2).sum() / max(len(means) - 1, 1)
            found = 2.0 * float(around) / means.shape[1]
        return max(found, 1e-150)

    def _scores(self, x_nd: Array) -> Array:
        x_nd = self._prepared(x_nd)
        if self.metric == "cosine":
            x_nd = unit(x_nd)
        seen = self.counts_ > 0
        with np.errstate(divide="ignore"):
            log_prior = np.log(self._class_priors())
        scores = np.full((len(x_nd), len(self.classes_)), -np.inf)
        away = squared_distances(x_nd, self.means_[seen])
        scores[:, seen] = log_prior[seen] - away / (2.0 * self.variance_)
        return scores

    def _check_knobs(self) -> None:
        if self.metric not in METRICS:
            raise OptionError(f"metric is {self.metric!r}; {close_to(str(self.metric), METRICS)}")
        if self.variance is not None:
            positive("variance", self.variance)

    def _class_priors(self) -> Array:
        """Return the prior of each class (C,), zero for those without shots where the knob is a name."""
        seen = self.counts_ > 0
        if isinstance(self.priors, str):
            if self.priors not in PRIORS:
                raise OptionError(f"priors is {self.priors!r}; {close_to(self.priors, PRIORS)}, or numbers (C,)")
            weights: Array = (self.counts_ if self.priors == "empirical" else seen).astype(np.float64)
        else:
            weights = np.asarray(self.priors, np.float64)
            if weights.shape != self.classes_.shape:
                raise OptionError(f"priors has shape {weights.shape}; there are {len(self.classes_)} classes")
            if not np.isfinite(weights).all() or (weights < 0).any() or not (weights * seen).sum() > 0:
                raise OptionError(f"priors is {self.priors!r}; none may be negative, one with shots must be positive")
        result: Array = weights / weights.sum()
        return result

    def _start(self, dimension: int) -> None:
        self.classes_ = np.empty(0)
        self.counts_ = np.zeros(0, np.int64)
        self.sums_ = np.zeros((0, dimension))
        self.scatters_ = np.zeros(0)

    def _welcome(self, labels: Labels) -> None:
        """Make room for labels that are new, keeping classes sorted."""
        if len(self.classes_) and _kind(labels) != _kind(self.classes_):
            raise InputError(f"labels are {labels.dtype}, but the classes known so far are {self.classes_.dtype}")
        merged: Labels = np.union1d(self.classes_, labels) if len(self.classes_) else labels
        place = np.searchsorted(merged, self.classes_) if len(self.classes_) else np.zeros(0, np.intp)

        def spread(old: npt.NDArray[Any]) -> npt.NDArray[Any]:
            new = np.zeros((len(merged), *old.shape[1:]), old.dtype)
            new[place] = old
            return new

        self.counts_, self.sums_, self.scatters_ = spread(self.counts_), spread(self.sums_), spread(self.scatters_)
        self.classes_ = merged

    def _count(self, x_nd: Array, y_n: Labels) -> None:
        x_nd = self._prepared(x_nd)
        if self.metric == "cosine":
            x_nd = unit(x_nd)
        labels, index = np.unique(y_n, return_inverse=True)
        self._welcome(labels)
        for i, c in enumerate(np.searchsorted(self.classes_, labels)):
            shots = x_nd[index == i]
            self._add(int(c), shots)

    def _add(self, c: int, shots: Array) -> None:
        """Add the shots (n, d) of class c; the scatter by the parallel rule of Chan et al. 1979."""
        n, before = len(shots), int(self.counts_[c])
        total = shots.sum(axis=0)
        mean = total / n
        scatter = float(((shots - mean) ** 2).sum())
        if before:
            gap = mean - self.sums_[c] / before
            scatter += float(gap @ gap) * before * n / (before + n)
        self.scatters_[c] += scatter
        self.sums_[c] += total
        self.counts_[c] += n


def _kind(labels: Labels) -> str:
    return "text" if labels.dtype.kind in "USO" else "number"
