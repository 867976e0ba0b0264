"""Fusion of what text predicts with what shots show: weights in closed form, or the best of a grid on other data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.classifier import Labels
from thrifty.fewshot.episodes import Episodes, Ints
from thrifty.fewshot.preprocess import Array, InputError
from thrifty.fewshot.text_statistics.learning import TextToStatistics, relative_spreads
from thrifty.fewshot.text_statistics.named_features import NamedFeatures, Selection

GRID: Array = np.round(np.arange(21) * 0.05, 2)


@dataclass(frozen=True, eq=False)
class Choice:
    """Weights of text chosen on other data: `alpha` of the mean, `beta` of the spread."""

    alpha: float
    beta: float
    accuracy: float  # of the chosen pair where it was chosen
    alphas: Array  # (A,) tried
    betas: Array  # (B,)
    table: Array  # (A, B) accuracies
    selection: Selection
    classes: Labels  # on which it was chosen


def class_scales(spreads: Array, beta: float, relative: bool) -> Array:
    """Return each class's scale, beta * spread + (1 - beta) * 1: (C, d), or covariances (C, d, d).

    relative: divide the spread by its geometric mean first, so that 1 is its middle. Without (the paper's code), a
    spread far below 1 hardly counts until beta is near 1.
    """
    spreads = relative_spreads(spreads) if relative else spreads
    one = np.ones(spreads.shape[-1]) if spreads.ndim == 2 else np.eye(spreads.shape[-1])
    found: Array = beta * spreads + (1.0 - beta) * one
    return found


def whitening(scale: Array) -> Array:
    """Return what a feature is multiplied with so that the distance is Euclidean: (d,), or (d, d).

    scale: standard deviations (d,) or a covariance (d, d); for a covariance S the result W has W W' = S^-1.
    """
    if scale.ndim == 1:
        return 1.0 / scale
    found: Array = np.linalg.inv(np.linalg.cholesky(scale)).T
    return found


def whitened(x_nd: Array, weights: Array) -> Array:
    """Return features (n, d) after `whitening`."""
    found: Array = x_nd * weights if weights.ndim == 1 else x_nd @ weights
    return found


def closed_alpha(
    statistics: TextToStatistics, counts: npt.NDArray[np.int64], weights: Array, per_dimension: bool = False
) -> Array:
    """Return the weight of the predicted mean for classes with `counts` (C,) shots: (C, 1), or (C, d).

    alpha = (s^2 / k) / (s^2 / k + tau^2), with s^2 the variance within a class and tau^2 the squared error of the
    predicted means, both measured in `learn_statistics`; summed over dimensions in the metric of `weights`
    (whitening), or in each dimension. It minimises the expected squared error of alpha * text + (1 - alpha) * shots.
    No shots: 1.
    """
    importance = weights**2 if weights.ndim == 1 else (weights**2).sum(axis=1)
    noise, error = importance * statistics.within, importance * statistics.error
    if not per_dimension:
        noise, error = noise.sum(keepdims=True), error.sum(keepdims=True)
    noise = np.maximum(noise, 1e-300)  # a constant feature: text where there are no shots, else shots
    error = np.maximum(error, 1e-9 * noise)
    # multiplied by k: no division by zero shots
    found: Array = noise / (noise + counts[:, None] * error)
    return found


def grid_counts(
    text_means: Array, spreads: Array, shot_means: Array, queries: Array, truth: Ints,
    alphas_of: Callable[[Array], Array], betas: Array, relative: bool,
) -> Ints:  # fmt: skip
    """Return how many queries each pair of weights labels right, (A, B).

    text_means, shot_means: (C, d). queries: (n, d), truth: (n,) in 0..C-1. alphas_of: whitening weights -> (A, C).
    """
    found = []
    for beta in betas:
        weights = whitening(class_scales(spreads, float(beta), relative).mean(axis=0))
        alphas = alphas_of(weights)
        centre = shot_means.mean(axis=0)
        x, s = whitened(queries - centre, weights), whitened(shot_means - centre, weights)
        gap = whitened(text_means - shot_means, weights)
        # the mean is s + alpha * gap: scores x.m - |m|^2 / 2 for all alphas at once
        xs, xg = x @ s.T, x @ gap.T
        half = 0.5 * (s * s).sum(axis=1) + alphas * (s * gap).sum(axis=1) + 0.5 * alphas**2 * (gap * gap).sum(axis=1)
        scores = xs + alphas[:, None, :] * xg - half[:, None, :]
        found.append((scores.argmax(axis=2) == truth).sum(axis=1))
    return np.stack(found, axis=1).astype(np.int64)


def pick(right: Ints, asked: int, alphas: Array, betas: Array, on: str, classes: Labels) -> Choice:
    """Return the pair with the most right answers; of equals the least alpha, then the least beta."""
    a, b = np.unravel_index(int(right.argmax()), right.shape)
    table = right / asked
    alpha, beta = float(alphas[a]), float(betas[b])
    chosen = Selection("alpha, beta; accuracy", f"{alpha:.2f}, {beta:.2f}", on, float(table[a, b]), right.size)
    return Choice(alpha, beta, float(table[a, b]), alphas, betas, table, chosen, classes)


def choose_on_classes(
    statistics: TextToStatistics, validation: NamedFeatures, episodes: Episodes,
    *, alphas: npt.ArrayLike = GRID, betas: npt.ArrayLike = GRID, relative: bool = True,
) -> Choice:  # fmt: skip
    """Return the weights that label most queries of validation classes right, for the shots that episodes have.

    validation: it must not hold base classes of the statistics. episodes: of rows of it, all with the same ways, shots
    and queries (`uniform` draws such). Raises InputError otherwise.
    """
    base = set(statistics.base.tolist())
    leaked = [c for c in validation.classes.tolist() if c in base]
    if leaked:
        raise InputError(f"{len(leaked)} validation class(es) are base classes: {', '.join(map(repr, leaked[:20]))}")
    if not episodes.even or not len(episodes):
        raise InputError("episodes must be some, all with the same ways, shots and queries")
    x_nd = statistics.prepared(validation.features)
    text_means, spreads = statistics.predict(validation.text_rows)
    alphas, betas = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
    ways, shots, queries = (*episodes.support.shape[1:], episodes.query.shape[2])
    right = np.zeros((len(alphas), len(betas)), np.int64)
    truth = np.repeat(np.arange(ways), queries)
    for classes, support, query in zip(episodes.classes, episodes.support, episodes.query, strict=True):
        right += grid_counts(
            text_means[classes], spreads[classes], x_nd[support].mean(axis=1), x_nd[query.ravel()], truth,
            lambda _weights: np.repeat(alphas[:, None], ways, axis=1), betas, relative,
        )  # fmt: skip
    on = f"{len(episodes)} episodes of {len(validation.classes)} validation classes, {ways} ways, {shots} shots"
    return pick(right, len(episodes) * ways * queries, alphas, betas, on, validation.classes)
