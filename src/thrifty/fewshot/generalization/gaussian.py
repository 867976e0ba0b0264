"""The error of nearest class mean when every class is Gaussian: re-embedded means, then areas by sampling."""

from __future__ import annotations

import numpy as np

from thrifty.errors import need
from thrifty.fewshot.generalization.moments import Moments, square_root
from thrifty.fewshot.preprocess import Array, OptionError

_STREAM = 1  # of random numbers; kept apart from those of the interval
BLOCK_BYTES = 8 * 2**20


def embed(distances: Array) -> Array:
    """Return points (E, C, C) with the given distances (E, C, C), their mean at zero: classical scaling.

    The symmetric square root of -1/2 J D^2 J with negative eigenvalues set to zero: the same points as Torgerson's
    up to a rotation, and unique. Where no points have these distances, they are approximate.
    """
    squared = distances * distances
    rows = squared.mean(axis=-1, keepdims=True)
    gram = -0.5 * (squared - rows - np.swapaxes(rows, -1, -2) + rows.mean(axis=-2, keepdims=True))
    return square_root(gram)


def shared_scale(found: Moments) -> Array:
    """Return s (E,): the standard deviation per dimension of the frame, pooled over classes, C (k - 1) freedom."""
    total = np.trace(found.scatter, axis1=2, axis2=3).sum(axis=1)
    freedom = (found.counts - 1).sum(axis=1) * found.rank
    result: Array = np.sqrt(total / np.where(freedom > 0, freedom, 1.0))
    return result


def factors(found: Moments, covariance: str, sigma: float | None) -> Array:
    """Return L (E, C, C, C) with x = nu_c + z L_c: a root of each class covariance in the frame.

    covariance: a name of COVARIANCES. sigma: a scale given from outside replaces the estimates.
    """
    e, c = found.counts.shape
    eye = np.eye(c)
    if covariance == "identity":
        return np.broadcast_to(eye, (e, c, c, c))
    if sigma is not None:
        return np.broadcast_to(sigma * eye, (e, c, c, c))
    if covariance == "shared":
        return np.broadcast_to((shared_scale(found)[:, None, None] * eye)[:, None], (e, c, c, c))
    freedom = found.counts - 1
    if (freedom < (1 if covariance == "free" else c - 1)).any():
        least = 2 if covariance == "free" else c
        raise OptionError(
            f"covariance='{covariance}' needs {least} shots of every class here; there are {int(found.counts.min())} "
            "in one: use covariance='shared'"
        )
    if covariance == "free":
        total = np.trace(found.scatter, axis1=2, axis2=3)
        scale = np.sqrt(total / (freedom * np.maximum(found.rank, 1)[:, None]))
        roots: Array = scale[:, :, None, None] * eye
        return roots
    return square_root(found.scatter / freedom[:, :, None, None])


COVARIANCES = {
    "shared": "one isotropic scale, pooled over the classes",
    "free": "one isotropic scale per class",
    "identity": "scale 1: features are already in units of their noise",
    "full": "one full covariance per class, in the frame of the means; needs as many shots as classes",
}


def align(points: Array, found: Moments) -> Array:
    """Return the points (E, C, C) turned to lie on the measured means (orthogonal Procrustes).

    A full covariance lives in the frame of the means; re-embedded points come in a frame of their own.
    """
    target = square_root(found.gram)
    u, _, vt = np.linalg.svd(np.swapaxes(points, -1, -2) @ target)
    result: Array = points @ u @ vt
    return result


def confusions(offsets: Array, noises: Array, samples: int, seed: int) -> Array:
    """Return P (E, C, C): the probability that a query of class c gets the highest score at class j.

    Scores of a query of class c: offsets[c] + z noises[c], z normal. offsets: (E, C, C). noises: (E, C, Z, C).
    Two classes: exact. More: `samples` draws per class, the same for every episode. Ties go to the first class.
    """
    e, ways = offsets.shape[:2]
    if ways == 2:
        return _two(offsets, noises)
    result = np.zeros((e, ways, ways))
    block = max(1, int(BLOCK_BYTES / (8 * ways * samples)))
    for c in range(ways):
        z = np.random.default_rng([_STREAM, seed, c]).standard_normal((samples, noises.shape[2]))
        for start in range(0, e, block):
            part = slice(start, start + block)
            scores = np.swapaxes(noises[part, c], 1, 2) @ z.T + offsets[part, c, :, None]
            result[part, c] = _winners(scores) / samples
    return result


def _winners(scores: Array) -> Array:
    """Return how often each class has the highest score (e, C); scores: (e, C, samples)."""
    best, winner = scores[:, 0].copy(), np.zeros((len(scores), scores.shape[2]), np.int16)
    for j in range(1, scores.shape[1]):
        np.copyto(winner, j, where=scores[:, j] > best)
        np.maximum(best, scores[:, j], out=best)
    return np.stack([(winner == j).sum(axis=1) for j in range(scores.shape[1])], axis=1).astype(float)


def _two(offsets: Array, noises: Array) -> Array:
    """Two classes: Phi of the margin over its standard deviation; without noise or margin, the first class wins."""
    normal = need("scipy.special", extra="fewshot").ndtr
    margin = offsets[:, :, 1] - offsets[:, :, 0]  # (E, 2): above zero the query goes to the second class
    spread = np.linalg.norm(noises[:, :, :, 1] - noises[:, :, :, 0], axis=2)
    sure = np.where(margin > 0, np.inf, -np.inf)
    ratio = np.where(spread > 0, margin / np.where(spread > 0, spread, 1.0), sure)
    return np.stack([normal(-ratio), normal(ratio)], axis=2)


def model_confusions(points: Array, roots: Array, samples: int, seed: int) -> Array:
    """Return the confusions (E, C, C) of nearest mean among points (E, C, C) for x = point_c + z roots_c."""
    inner = points @ np.swapaxes(points, -1, -2)
    offsets = inner - 0.5 * np.diagonal(inner, axis1=-2, axis2=-1)[:, None, :]
    noises = roots @ np.swapaxes(points, -1, -2)[:, None]
    return confusions(offsets, noises, samples, seed)


def errors(found: Array) -> Array:
    """Return the mean error over classes (E,) of confusions (E, C, C)."""
    result: Array = 1.0 - np.trace(found, axis1=1, axis2=2) / found.shape[-1]
    return result
