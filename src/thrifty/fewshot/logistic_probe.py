"""A logistic (linear) probe on frozen features, its penalty chosen without any validation set."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import need
from thrifty.fewshot.classifier import Labels, Preprocessed, positive
from thrifty.fewshot.preprocess import Array, InputError, OptionError

GRID = tuple(10.0**e for e in range(-4, 5))  # what C="folds" tries
FOLDS = 5  # at most; a fold holds out one shot of every class in turn


class LogisticProbe(Preprocessed):
    """Multinomial logistic regression with an L2 penalty on the weights (not on the intercept).

    The problem is solved in the span of the shots, where the optimum lies, so that n shots of d >> n features
    cost as much as n features. C is the inverse of the penalty, as in scikit-learn; C="folds" tries GRID by
    cross-validation on the shots themselves (fold i holds out shots i, i + FOLDS, ... of every class), takes the
    smallest log loss and, of equals, the strongest penalty. It needs two shots of every class.

    Source: the linear probe used as a baseline by CLIP (Radford et al. 2021, section 3.1) and CoOp; theirs
    searches C on validation images, this one does not have any.

    Raises OptionError and InputError.

    >>> probe = LogisticProbe().fit([[0.0, 1.0], [1.0, 0.0]], ["up", "right"])
    >>> probe.predict([[0.1, 2.0]])
    array(['up'], dtype='<U5')
    """

    classes_: Labels
    coef_: Array  # (C, d)
    intercept_: Array  # (C,)
    penalty_: float  # the C used
    losses_: dict[float, float]  # log loss of each C tried

    def __init__(
        self,
        C: float | str = 1.0,  # inverse penalty, or "folds"
        *,
        preprocess: str = "",  # letters of thrifty.fewshot.preprocess
        base_mean: npt.ArrayLike | str | None = None,  # what 'M' subtracts: (d,), or "support"
        iterations: int = 1000,  # at most, of L-BFGS
        tolerance: float = 1e-6,  # stop when the gradient is below
    ) -> None:
        self.C = C
        self.preprocess = preprocess
        self.base_mean = base_mean
        self.iterations = iterations
        self.tolerance = tolerance

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> LogisticProbe:
        """Learn from the shots X (n, d) with labels y (n,)."""
        folds = isinstance(self.C, str)
        if folds and self.C != "folds":
            raise OptionError(f"C is {self.C!r}; it must be a positive number, or 'folds'")
        x_nd, y_n = self._support(X, y)
        self._learn_mean(x_nd)
        self.classes_, index = np.unique(y_n, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"a logistic probe needs two classes; there is one class, {self.classes_[0]!r}")
        x_nd = self._prepared(x_nd)
        centre = x_nd.mean(axis=0)
        z_nr, basis_rd = span(x_nd - centre)
        self.losses_ = self._search(z_nr, index) if folds else {}
        # of equal losses the first, that is the strongest penalty
        self.penalty_ = min(self.losses_, key=self.losses_.__getitem__) if folds else positive("C", self.C)
        weights, intercept = self._solve(z_nr, index, self.penalty_)
        self.coef_ = weights @ basis_rd
        self.intercept_ = intercept - self.coef_ @ centre
        return self

    def _scores(self, x_nd: Array) -> Array:
        result: Array = self._prepared(x_nd) @ self.coef_.T + self.intercept_
        return result

    def _search(self, z_nr: Array, index: npt.NDArray[np.intp]) -> dict[float, float]:
        counts = np.bincount(index)
        if counts.min() < 2:
            few = [str(c) for c in self.classes_[counts < 2]]
            raise InputError(f"C='folds' needs two shots per class; one only for: {', '.join(few)}")
        fold = rank_in_class(index) % min(FOLDS, int(counts.min()))
        return {penalty: self._loss(z_nr, index, fold, penalty) for penalty in GRID}

    def _loss(self, z_nr: Array, index: npt.NDArray[np.intp], fold: npt.NDArray[np.intp], penalty: float) -> float:
        losses = []
        for i in range(int(fold.max()) + 1):
            train, held = fold != i, fold == i
            weights, intercept = self._solve(z_nr[train], index[train], penalty)
            scores = z_nr[held] @ weights.T + intercept
            top = scores.max(axis=1, keepdims=True)
            log_sum = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0]
            losses.append(log_sum - scores[np.arange(len(scores)), index[held]])
        return round(float(np.concatenate(losses).mean()), 6)

    def _solve(self, z_nr: Array, index: npt.NDArray[np.intp], penalty: float) -> tuple[Array, Array]:
        """Return weights (C, r) and intercepts (C,); two classes give rows -w/2 and w/2."""
        linear = need("sklearn.linear_model", extra="fewshot")
        solver: Any = linear.LogisticRegression(C=penalty, tol=self.tolerance, max_iter=self.iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("error", need("sklearn.exceptions", extra="fewshot").ConvergenceWarning)
            try:
                solver.fit(z_nr, index)
            except Warning as err:
                raise InputError(
                    f"the probe did not converge in {self.iterations} iterations at C={penalty}; scale the features "
                    "(preprocess='E'), lower C, or raise iterations"
                ) from err
        weights, intercept = solver.coef_, solver.intercept_
        if len(weights) == 1:
            weights = np.concatenate([-weights, weights]) / 2
            intercept = np.concatenate([-intercept, intercept]) / 2
        return weights, intercept


def span(x_nd: Array) -> tuple[Array, Array]:
    """Return coordinates (n, r) and an orthonormal basis (r, d) of the span of the rows, x = coordinates @ basis.

    With more rows than columns, the rows and the identity.
    """
    n, d = x_nd.shape
    if n > d:
        return x_nd, np.eye(d)
    u, s, vt = np.linalg.svd(x_nd, full_matrices=False)
    keep = s > s[:1].max(initial=0.0) * 1e-12
    if not keep.any():
        return np.zeros((n, 1)), np.zeros((1, d))
    return u[:, keep] * s[keep], vt[keep]


def rank_in_class(index: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return how many earlier items have the same class, for each item.

    >>> rank_in_class(np.array([0, 1, 0, 0, 1]))
    array([0, 0, 1, 2, 1])
    """
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], index[order])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(index)) - starts
    return rank
