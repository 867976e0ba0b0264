"""OneClass: is it this, when all that is known is the name? A scikit-learn classifier on embeddings."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.classifier import FewShotClassifier, Labels, positive
from thrifty.fewshot.one_class.rules import (
    NEED_NEGATIVES,
    NEED_THRESHOLD,
    Evidence,
    Knobs,
    check_method,
    evidence,
    margin,
)
from thrifty.fewshot.preprocess import Array, InputError, OptionError, unit


class OneClass(FewShotClassifier):
    """Decide whether image embeddings show a class of which only the label is known.

    `fit` takes *text* embeddings: y says which rows are the label (the larger of two values, as True or 1) and which
    are negatives; several rows of the label (templates, synonyms) are averaged. `predict` takes *image* embeddings of
    the same encoder pair. Everything is scaled to unit length and computed in float64. The methods:

    - "ANP": positive where x.t > x.n, n the average negative scaled to unit length (`normalise=False`: raw).
    - "max-negative": x.t above the similarity with every negative.
    - "FT": x.t above one calibrated threshold; no negatives needed.
    - "ANP+FT": x.t > weight * x.n + (1 - weight) * threshold.
    - "softmax" and "EOE": baselines (`rules`).

    The probability is the logistic function of scale * margin, so above one half exactly where the decision is
    positive. The default scale is only a number: `calibrate` finds one.

    Source: Bendou et al. 2024, LLM meets Vision-Language Models for Zero-Shot One-Class Classification
    (arXiv:2404.00675), from the paper's description: its code was never published. The normalisation of the average and
    the rule that blends are ours (specs/fewshot.md 3b).

    Raises OptionError (a KnobError and a ValueError) and InputError (a DataError and a ValueError).

    >>> texts = [[1.0, 0.0], [0.0, 1.0]]  # a cat; a dog
    >>> OneClass().fit(texts, [True, False]).predict([[0.9, 0.1], [0.2, 0.9]])
    array([ True, False])
    """

    declared_failures: ClassVar[dict[str, str]] = {}
    classes_: Labels  # (2,) what negatives are called, what the target is called
    target_: Array  # (d,) unit length
    negatives_: Array  # (K, d) unit length

    def __init__(
        self,
        method: str = "ANP",  # one of rules.RULES
        *,
        threshold: float | None = None,  # FT, ANP+FT, EOE: found by `calibrate`
        weight: float = 0.5,  # ANP+FT: share of the adaptive part, in [0, 1]
        normalise: bool = True,  # ANP, ANP+FT: unit length of the average negative
        scale: float = 100.0,  # of the margin in the probability
        temperature: float = 0.01,  # softmax, EOE
        beta: float = 0.25,  # EOE
    ) -> None:
        self.method = method
        self.threshold = threshold
        self.weight = weight
        self.normalise = normalise
        self.scale = scale
        self.temperature = temperature
        self.beta = beta

    @classmethod
    def of(cls, target: npt.ArrayLike, negatives: npt.ArrayLike = (), **knobs: Any) -> OneClass:
        """Return a fitted detector of target (d,) or (templates, d) against negatives (K, d).

        >>> OneClass.of([1.0, 0.0], method="FT", threshold=0.5).predict([[0.6, 0.8], [0.4, 0.9]])
        array([ True, False])
        """
        rows = np.atleast_2d(np.asarray(target, np.float64))
        others = np.asarray(negatives, np.float64)
        others = others.reshape(0, rows.shape[1]) if not others.size else np.atleast_2d(others)
        if others.shape[1:] != rows.shape[1:]:
            raise InputError(
                f"the target is {rows.shape[1:]}, the negatives {others.shape[1:]}; use one encoder for both"
            )
        y = np.arange(len(rows) + len(others)) < len(rows)
        return cls(**knobs).fit(np.concatenate([rows, others]), y)

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> OneClass:
        """Learn the label and its negatives from text embeddings X (1 + K, d) with y (1 + K,)."""
        self._knobs()
        x_nd, y_n = self._support(X, y)
        self.classes_ = self._names(y_n)
        told = y_n == self.classes_[1]
        x_nd = unit(x_nd)
        self.target_, self.negatives_ = unit(x_nd[told].mean(axis=0)), x_nd[~told]
        return self

    def similarities(self, X: npt.ArrayLike) -> Evidence:
        """Return the similarities of image embeddings X (n, d) with target, negatives and prototype."""
        return evidence(unit(self._queries(X)), self.target_, self.negatives_, self.normalise)

    def threshold_of(self, X: npt.ArrayLike) -> Array:
        """Return lambda (n,), what x.t is compared with for each image; not for "EOE", whose score is no cosine."""
        if self.method == "EOE":
            raise OptionError("method 'EOE' compares no cosine with a threshold; use decision_function")
        found = self.similarities(X)
        return found.score - margin(self.method, found, self._knobs())

    def predict_proba(self, X: npt.ArrayLike) -> Array:
        """Return (n, 2): the probability of not being, and of being, the target."""
        z = self.scale * self.decision_function(X)
        being = 0.5 * (1.0 + np.tanh(0.5 * z))
        return np.column_stack([1.0 - being, being])

    def _scores(self, x_nd: Array) -> Array:
        found = margin(self.method, evidence(unit(x_nd), self.target_, self.negatives_, self.normalise), self._knobs())
        return np.column_stack([np.zeros(len(found)), found])

    def _names(self, y_n: Labels) -> Labels:
        """Return what negatives and target are called."""
        names: Labels = np.unique(y_n)
        if len(names) > 2:
            raise InputError(
                "Only binary classification is supported. The type of the target is multiclass: "
                f"y has {len(names)} values; it must say which rows are the label (True) and which are negatives"
            )
        if len(names) == 2:
            return names
        if self.method in NEED_NEGATIVES or names.dtype.kind not in "biuf" or names[0] != 1:
            raise InputError(
                f"y has one class, {names[0]!r}; '{self.method}' needs rows of the label (True) and of negatives "
                "(False); only method='FT' does without negatives"
            )
        return np.array([0, 1]).astype(names.dtype)

    def _knobs(self) -> Knobs:
        check_method(self.method)
        if not 0.0 <= self.weight <= 1.0:
            raise OptionError(f"weight is {self.weight}; it must be in [0, 1]: 1 is ANP, 0 is FT")
        positive("scale", self.scale)
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise OptionError(f"threshold is {self.threshold}; it must be a finite number")
        if self.method in NEED_THRESHOLD and self.threshold is None:
            raise OptionError(
                f"method '{self.method}' needs a threshold, which depends on the encoder and the prompt template: "
                "find it with thrifty.fewshot.one_class.calibrate on tasks of other classes, or use method='ANP'"
            )
        if not 0.0 <= self.beta < np.inf:
            raise OptionError(f"beta is {self.beta}; it must be 0 or more")
        return Knobs(self.threshold, float(self.weight), positive("temperature", self.temperature), float(self.beta))

    def __sklearn_tags__(self) -> Any:
        """Say to scikit-learn that there are two classes."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
