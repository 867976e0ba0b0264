"""The estimator: nearest class mean whose means and metric are helped by what the class names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import close_to, need
from thrifty.fewshot.classifier import FewShotClassifier, Labels, positive, squared_distances
from thrifty.fewshot.nearest_class_mean import NearestClassMean
from thrifty.fewshot.preprocess import Array, InputError, OptionError
from thrifty.fewshot.text_statistics.fusion import (
    GRID,
    Choice,
    class_scales,
    closed_alpha,
    grid_counts,
    pick,
    whitened,
    whitening,
)
from thrifty.fewshot.text_statistics.learning import TextToStatistics
from thrifty.fewshot.text_statistics.named_features import Selection, Texts, embeddings

ALPHAS = ("closed", "per_dimension", "validation")
BETAS = ("closed", "validation")
OPEN_SET_SLOPE = 0.01


class TextStatistics(FewShotClassifier):
    """Label a query with the class of the nearest mean, where text helps to estimate the mean and the metric.

    mean_c = alpha g_mean(text_c) + (1 - alpha) mean of the shots; scale_c = beta g_spread(text_c) + (1 - beta) 1;
    scale = mean of scale_c over the classes; label = argmin_c |(x - mean_c) / scale|. The predictors g come from
    `learn_statistics`, fitted on other classes: a class that was used there is refused, by label or by text. A
    class without shots has alpha = 1. Without `statistics` and `texts` this is NearestClassMean.

    Knobs "closed" need no data: alpha from the measured error of the predictor (`closed_alpha`, for all dimensions
    together or "per_dimension"), beta by least squares on the validation classes. beta is 0 by default: a spread
    well predicted may still be a bad metric where dimensions depend on each other; `components` of
    `learn_statistics` helps, and a Choice tells. "validation" takes the best pair
    of a grid on the shots that `fit(..., validation=(X, y))` holds out; a `Choice` is the best pair on validation
    classes. `log_` says what was chosen, where, and among how many.

    Source: "Inferring Latent Class Statistics from Text for Robust Visual Few-Shot Learning" (arXiv:2311.14544) and
    its code; `relative`, the closed forms, partial_fit and the probabilities are ours.

    Raises OptionError and InputError.

    >>> TextStatistics().fit([[0.0], [2.0]], ["low", "high"]).predict([[1.7]])
    array(['high'], dtype='<U4')
    """

    shots_: NearestClassMean
    alpha_: Array  # (C, 1), or (C, d) where per dimension
    beta_: float
    means_: Array  # (C, d) fused, of prepared features
    scale_: Array  # (d,) standard deviations, or (d, d) covariance: the metric that all classes share
    class_scales_: Array  # (C, d) or (C, d, d): each class's own, for the open set
    variance_: float  # of the probabilities, per dimension, in that metric
    log_: tuple[Selection, ...]

    def __init__(
        self,
        statistics: TextToStatistics | None = None,
        texts: Texts | None = None,  # label -> text embedding (d_t,); may hold more classes than there are shots for
        *,
        alpha: float | str | Choice = "closed",  # weight of text in the mean, in [0, 1], or one of ALPHAS
        beta: float | str | Choice = 0.0,  # weight of text in the scale, in [0, 1], or one of BETAS
        relative: bool = True,  # predicted spreads over their geometric mean; False: as the paper's code has it
        variance: float | None = None,  # of the probabilities; None: from the measured variance and error
    ) -> None:
        self.statistics = statistics
        self.texts = texts
        self.alpha = alpha
        self.beta = beta
        self.relative = relative
        self.variance = variance

    def fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, validation: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    ) -> TextStatistics:
        """Forget everything, then learn from the shots X (n, d) with labels y (n,).

        validation: more shots (m, d), (m,) of the same classes, only to choose knobs that are "validation".
        """
        self._check_knobs()
        if validation is None and "validation" in (self.alpha, self.beta):
            raise OptionError(
                "alpha or beta is 'validation': call fit(X, y, validation=(X, y) held out), or use 'closed'"
            )
        x_nd, y_n = self._support(X, y)
        self._refuse(np.unique(y_n))
        self.shots_ = NearestClassMean().fit(self._prepared(x_nd), y_n)
        self._chosen = None if validation is None else self._choose(*validation)
        self._settle()
        return self

    def fit_texts(self, classes: npt.ArrayLike | None = None) -> TextStatistics:
        """Forget everything, then learn classes from their texts alone, without a shot; None: all of `texts`.

        `partial_fit` may bring shots later.
        """
        self._check_knobs()
        if self.statistics is None or self.texts is None:
            raise OptionError("fit_texts needs statistics and texts")
        if "validation" in (self.alpha, self.beta):
            raise OptionError(
                "alpha or beta is 'validation', but there are no shots: use 'closed', a number or a Choice"
            )
        self.n_features_in_ = self.statistics.prepared.inputs
        self.shots_ = NearestClassMean()
        named = np.unique(np.asarray(list(self.texts) if classes is None else classes))
        self._refuse(named)
        self.shots_._learn_mean(np.empty((0, self.statistics.dimension)))
        self.shots_._start(self.statistics.dimension)
        self.shots_._welcome(named)
        self._chosen = None
        self._settle()
        return self

    def partial_fit(self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> TextStatistics:
        """Add shots; new labels become new classes, and the closed-form weights follow the counts.

        X: (n, d). y: (n,). classes: labels that may come later; those with a text can be predicted at once.
        """
        first = not hasattr(self, "shots_")
        if first:
            self._check_knobs()
            if "validation" in (self.alpha, self.beta):
                raise OptionError("alpha or beta is 'validation': call fit with validation shots before partial_fit")
        x_nd, y_n = self._support(X, y, reset=first)
        self._refuse(np.unique(y_n))
        if classes is not None:
            self._refuse(np.unique(np.asarray(classes)))
        if first:
            self.shots_, self._chosen = NearestClassMean(), None
        self.shots_.partial_fit(self._prepared(x_nd), y_n, classes)
        self._settle()
        return self

    def open_set_scores(self, X: npt.ArrayLike) -> Array:
        """Return how much each query belongs to each class (n, C), in (0, 0.5]; it needs no other class.

        1 - sigmoid(0.01 * |(x - mean_c) / scale_c|) with the class's own scale. Only its order means something.
        """
        x_nd = self._prepared(self._queries(X))
        expit = need("scipy.special", extra="fewshot").expit
        columns = []
        for mean, scale in zip(self.means_, self.class_scales_, strict=True):
            away = np.linalg.norm(whitened(x_nd - mean, whitening(scale)), axis=1)
            columns.append(expit(-OPEN_SET_SLOPE * away))
        return np.stack(columns, axis=1)

    def _scores(self, x_nd: Array) -> Array:
        weights = whitening(self.scale_)
        known = self._known()
        scores = np.full((len(x_nd), len(self.classes_)), -np.inf)
        away = squared_distances(whitened(self._prepared(x_nd), weights), whitened(self.means_[known], weights))
        scores[:, known] = -away / (2.0 * self.variance_)
        return scores

    def _prepared(self, x_nd: Array) -> Array:
        if self.statistics is None:
            return x_nd
        if x_nd.shape[1] != self.statistics.prepared.inputs:
            raise InputError(
                f"X has {x_nd.shape[1]} features; the text statistics were learned on {self.statistics.prepared.inputs}"
            )
        return self.statistics.prepared(x_nd)

    def _known(self) -> npt.NDArray[np.bool_]:
        """Return which classes can be predicted: those with shots, and with text all."""
        return (self.shots_.counts_ > 0) | (self.statistics is not None)

    def _check_knobs(self) -> None:
        if (self.statistics is None) != (self.texts is None):
            raise OptionError("statistics and texts go together: give both, or neither for plain nearest class mean")
        for name, names in (("alpha", ALPHAS), ("beta", BETAS)):
            value = getattr(self, name)
            if isinstance(value, str):
                if value not in names:
                    raise OptionError(f"{name} is {value!r}; {close_to(value, names)}, or a number in [0, 1]")
            elif not isinstance(value, Choice) and not _is_weight(value):
                raise OptionError(f"{name} is {value!r}; it must be in [0, 1], one of {names}, or a Choice")
        if self.alpha == "per_dimension" and self.beta == "validation":
            raise OptionError("alpha='per_dimension' has no grid: use beta='closed' or a number with it")
        if self.variance is not None:
            positive("variance", self.variance)

    def _refuse(self, classes: Labels) -> None:
        """Raise InputError for classes without text, and for those that predictor or Choice have seen."""
        if self.statistics is None:
            return
        self.statistics.refuse_seen(classes, embeddings(self.texts or {}, classes))
        for knob in (self.alpha, self.beta):
            if isinstance(knob, Choice):
                both = sorted(set(knob.classes.tolist()) & set(classes.tolist()), key=str)
                if both:
                    raise InputError(f"the Choice was made on {len(both)} of the task's classes: {both[:20]}")

    def _settle(self) -> None:
        """Set what follows from the shots, the texts and the weights."""
        shots, statistics = self.shots_, self.statistics
        self.classes_ = shots.classes_
        d = shots.sums_.shape[1]
        if statistics is None:
            self.alpha_, self.beta_, self.log_ = np.zeros((len(self.classes_), 1)), 0.0, ()
            self.means_, self.scale_ = shots.means_, np.ones(d)
            self.class_scales_ = np.ones((len(self.classes_), d))
            self.variance_ = shots.variance_ if self.variance is None else self.variance
            return
        text_means, spreads = statistics.predict(embeddings(self.texts or {}, self.classes_))
        self.beta_ = self._beta(statistics)
        self.class_scales_ = class_scales(spreads, self.beta_, self.relative)
        self.scale_ = self.class_scales_.mean(axis=0)
        weights = whitening(self.scale_)
        self.alpha_ = self._alpha(statistics, weights)
        self.means_ = self.alpha_ * text_means + (1.0 - self.alpha_) * shots.means_
        self.variance_ = self._spread_of_queries(statistics, weights) if self.variance is None else self.variance
        self.log_ = (*statistics.log, *self._log())

    def _beta(self, statistics: TextToStatistics) -> float:
        if isinstance(self.beta, Choice):
            return self.beta.beta
        if self.beta == "validation":
            return self._chosen.beta if self._chosen else 0.0
        return statistics.beta if isinstance(self.beta, str) else float(self.beta)

    def _alpha(self, statistics: TextToStatistics, weights: Array) -> Array:
        counts = self.shots_.counts_
        if self.alpha in ("closed", "per_dimension"):
            return closed_alpha(statistics, counts, weights, self.alpha == "per_dimension")
        if isinstance(self.alpha, Choice):
            value = self.alpha.alpha
        elif self.alpha == "validation":
            value = self._chosen.alpha if self._chosen else 1.0
        else:
            value = float(self.alpha)
        found: Array = np.where(counts > 0, value, 1.0)[:, None]
        return found

    def _spread_of_queries(self, statistics: TextToStatistics, weights: Array) -> float:
        """Return the mean squared distance per dimension of a query to its class's fused mean, in the metric."""
        importance = weights**2 if weights.ndim == 1 else (weights**2).sum(axis=1)
        a = self.alpha_
        of_means = (
            a**2 * np.maximum(statistics.error, 0.0)
            + (1.0 - a) ** 2 * statistics.within / np.maximum(self.shots_.counts_, 1)[:, None]
        )
        return max(float((importance * (statistics.within + of_means)).mean()), 1e-150)

    def _choose(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Choice | None:
        """Return the best weights on held-out shots of the task's classes."""
        if self.statistics is None or "validation" not in (self.alpha, self.beta):
            return None
        statistics, shots = self.statistics, self.shots_
        x_nd = self._prepared(self._checked(X, reset=False))
        y_n = np.asarray(y)
        strangers = sorted(set(y_n.tolist()) - set(shots.classes_.tolist()), key=str)
        if y_n.shape != (len(x_nd),) or strangers:
            raise InputError(
                f"validation has {len(x_nd)} rows, labels {y_n.shape}; classes without shots: {strangers[:20]}"
            )
        text_means, spreads = statistics.predict(embeddings(self.texts or {}, shots.classes_))
        betas = GRID if self.beta == "validation" else np.array([self._beta(statistics)])
        alphas = GRID if self.alpha == "validation" else np.array([np.nan])

        def alphas_of(weights: Array) -> Array:
            if self.alpha == "validation":
                return np.repeat(GRID[:, None], len(shots.classes_), axis=1)
            return self._alpha(statistics, weights).T

        truth = np.searchsorted(shots.classes_, y_n)
        right = grid_counts(text_means, spreads, shots.means_, x_nd, truth, alphas_of, betas, self.relative)
        on = f"{len(y_n)} validation shots of the task"
        return pick(right, len(y_n), alphas, betas, on, shots.classes_)

    def _log(self) -> tuple[Selection, ...]:
        found = [k.selection for k in dict.fromkeys((self.alpha, self.beta)) if isinstance(k, Choice)]
        if self._chosen is not None:
            found.append(self._chosen.selection)
        if self.alpha in ("closed", "per_dimension"):
            values = f"{self.alpha_.mean():.3f} (mean over classes)"
            found.append(Selection("alpha, closed form", values, "the counts of shots", None, 1))
        return tuple(found)


def _is_weight(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and 0.0 <= float(value) <= 1.0
