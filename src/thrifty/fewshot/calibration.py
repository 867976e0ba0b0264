"""Probabilities of nearest class mean that mean something: its variance from leave-one-out on the shots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.classifier import softmax, squared_distances
from thrifty.fewshot.preprocess import Array, InputError

STEPS = 2.0 ** np.arange(-2.0, 16.1, 0.25)  # what the pooled variance is multiplied by


def left_out_variance(features: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Return the variance that gives `NearestClassMean` the best probabilities for shots that it has not seen.

    features: (n, d), preprocessed as the classifier will; labels: (n,). Scores are -|x - m|^2 / (2 variance). With the
    pooled within-class variance per dimension, which is right for independent dimensions, they are far too certain
    on features of networks, whose dimensions are not; of the multiples STEPS of it, this is the one with the smallest
    log loss over shots left out one at a time. Labels do not change. None where no class has two shots.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((40, 4)) + 2.0 * np.repeat(np.eye(2, 4), 20, axis=0)
    >>> copies = np.tile(x, (1, 25))  # a hundred dimensions that say no more than four
    >>> ratio = left_out_variance(copies, [0] * 20 + [1] * 20) / left_out_variance(x, [0] * 20 + [1] * 20)
    >>> 20 < ratio < 32
    True
    """
    x_nd, y_n = np.asarray(features, np.float64), np.asarray(labels)
    if x_nd.ndim != 2 or y_n.shape != x_nd.shape[:1]:
        raise InputError(f"features have shape {x_nd.shape} and labels {y_n.shape}; they must be (n, d) and (n,)")
    classes, index, counts = np.unique(y_n, return_inverse=True, return_counts=True)
    judged = counts[index] > 1
    if len(classes) < 2 or not judged.any():
        return None
    means = np.stack([x_nd[index == c].mean(axis=0) for c in range(len(classes))])
    away = squared_distances(x_nd, means)
    rows = np.arange(len(x_nd))
    own = away[rows, index]
    within = max(float(own.sum()) / (float((counts - 1).sum()) * x_nd.shape[1]), 1e-150)
    away[rows, index] = own * (counts / np.maximum(counts - 1.0, 1.0))[index] ** 2
    away, target = away[judged], index[judged]
    losses = [_log_loss(away, target, within * step) for step in STEPS]
    return float(within * STEPS[int(np.argmin(losses))])


def _log_loss(away: Array, target: npt.NDArray[np.intp], variance: float) -> float:
    proba = softmax(-away / (2.0 * variance))
    return float(-np.log(np.maximum(proba[np.arange(len(target)), target], 1e-300)).mean())
