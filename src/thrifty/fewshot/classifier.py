"""What the few-shot estimators share: checked arrays, and from scores to labels and probabilities."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thrifty.errors import need
from thrifty.fewshot.preprocess import Array, InputError, OptionError, check_letters, preprocess

_base = need("sklearn.base", extra="fewshot")
_checks = need("sklearn.utils.validation", extra="fewshot")
_labels = need("sklearn.utils.multiclass", extra="fewshot")

Labels = npt.NDArray[Any]


class FewShotClassifier(_base.ClassifierMixin, _base.BaseEstimator):  # type: ignore[misc,name-defined]
    """A scikit-learn classifier on feature arrays that gives a score per class; the highest wins.

    A subclass writes `fit` and `_scores`, the unnormalised log probability of each class. Ties go to the first
    class in sorted order. Arrays are computed in float64 whatever their type.
    """

    # scikit-learn's checks that this estimator is known not to meet: name -> why. The battery reads it.
    declared_failures: ClassVar[dict[str, str]] = {}
    classes_: Labels

    @abstractmethod
    def _scores(self, x_nd: Array) -> Array:
        """Return (n, C) unnormalised log probabilities of checked queries."""

    def predict(self, X: npt.ArrayLike) -> Labels:
        """Return the label of each query; X: (n, d)."""
        winner = self._scores(self._queries(X)).argmax(axis=1)
        labels: Labels = self.classes_[winner]
        return labels

    def decision_function(self, X: npt.ArrayLike) -> Array:
        """Return the scores (n, C); with two classes their difference (n,), positive for the second class."""
        scores = self._scores(self._queries(X))
        if len(self.classes_) == 2:
            scores = scores[:, 1] - scores[:, 0]
        return scores

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return the probability (n, C) of each class of `classes_`."""
        return softmax(self._scores(self._queries(X)))

    def _queries(self, X: npt.ArrayLike) -> Array:
        _checks.check_is_fitted(self)
        return self._checked(X, reset=False)

    def _checked(self, X: npt.ArrayLike, reset: bool) -> Array:
        try:
            result: Array = _checks.validate_data(self, X, dtype=np.float64, reset=reset)
        except ValueError as err:
            raise InputError(str(err)) from err
        return result

    def _support(self, X: npt.ArrayLike, y: npt.ArrayLike, reset: bool = True) -> tuple[Array, Labels]:
        try:
            x_nd, y_n = _checks.validate_data(self, X, y, dtype=np.float64, reset=reset)
            _labels.check_classification_targets(y_n)
        except ValueError as err:
            raise InputError(str(err)) from err
        return x_nd, y_n


class Preprocessed(FewShotClassifier):
    """An estimator with the knobs `preprocess` (letters) and `base_mean` (what 'M' subtracts)."""

    preprocess: str
    base_mean: npt.ArrayLike | str | None
    mean_: Array | None

    def _learn_mean(self, x_nd: Array) -> None:
        """Check the two knobs and set `mean_`."""
        check_letters(self.preprocess)
        self.mean_ = None
        if "M" not in self.preprocess:
            return
        if isinstance(self.base_mean, str) and self.base_mean == "support":
            before = self.preprocess.split("M", maxsplit=1)[0]
            self.mean_ = preprocess(x_nd, before).mean(axis=0)
        elif self.base_mean is None or isinstance(self.base_mean, str):
            raise OptionError(
                f"preprocess '{self.preprocess}' centres, but base_mean is {self.base_mean!r}; give the mean feature "
                "(d,) of the base classes (thrifty.fewshot.base_mean), or 'support' for the mean of the shots"
            )
        else:
            self.mean_ = given_mean(self.base_mean, x_nd.shape[1])

    def _prepared(self, x_nd: Array) -> Array:
        return preprocess(x_nd, self.preprocess, self.mean_)


def given_mean(mean: npt.ArrayLike, dimension: int) -> Array:
    """Return a base mean as (d,) float64; raise OptionError for another shape or for NaN."""
    mean_d = np.asarray(mean, np.float64)
    if mean_d.shape != (dimension,) or not np.isfinite(mean_d).all():
        raise OptionError(f"base_mean has shape {mean_d.shape}; it must be ({dimension},), finite, as the features")
    return mean_d


def softmax(scores: Array) -> Array:
    """Return exp(scores) normalised over the last axis; -inf gives 0, +inf shares the probability.

    >>> softmax(np.array([[0.0, 0.0, -np.inf]]))
    array([[0.5, 0.5, 0. ]])
    """
    top = scores.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.exp(np.where(scores == top, 0.0, scores - top))
    result: Array = weights / weights.sum(axis=-1, keepdims=True)
    return result


def positive(name: str, value: object) -> float:
    """Return a finite positive number, or raise OptionError naming it."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 < float(value) < np.inf:  # type: ignore[arg-type]
        raise OptionError(f"{name} is {value!r}; it must be a positive number")
    return float(value)  # type: ignore[arg-type]


def squared_distances(x_nd: Array, m_cd: Array) -> Array:
    """Return (n, C) squared Euclidean distances, computed about the mean of the C points to keep digits."""
    centre = m_cd.mean(axis=0)
    x, m = x_nd - centre, m_cd - centre
    found = (x * x).sum(axis=1)[:, None] - 2.0 * (x @ m.T) + (m * m).sum(axis=1)
    result: Array = np.maximum(found, 0.0)
    return result
