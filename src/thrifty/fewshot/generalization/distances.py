"""Distances between class means from a few shots: biased, unbiased, and the one that nearest class mean sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError
from thrifty.fewshot.generalization.moments import Moments, moments_of_support
from thrifty.fewshot.preprocess import Array, InputError, OptionError


def measured(gram: Array) -> Array:
    """Return squared distances (E, C, C) between points of inner products gram (E, C, C)."""
    norms = np.diagonal(gram, axis1=-2, axis2=-1)
    found = norms[..., :, None] + norms[..., None, :] - 2.0 * gram
    result: Array = np.maximum(found, 0.0)
    return result


def noise(traces: Array, counts: Array) -> Array:
    """Return t_ij = tr S_i / k_i + tr S_j / k_j (E, C, C), zero on the diagonal."""
    each = traces / counts
    total = each[..., :, None] + each[..., None, :]
    ways = total.shape[-1]
    result: Array = total * (1.0 - np.eye(ways))
    return result


def unbiased_squared_distances(support: npt.ArrayLike, labels: npt.ArrayLike) -> Array:
    """Return U (C, C), unbiased for the squared distances between the true class means; entries may be negative.

    support: (n, d), labels: (n,), two shots of every class at least. U_ij = |m_i - m_j|^2 - tr S_i / k_i - tr S_j /
    k_j. Clip it only where it is used as a distance: averages of clipped values are biased again.

    Source: the unbiased distances of Bendou et al. 2022 (arXiv:2212.06461), in closed form.

    >>> unbiased_squared_distances([[0.0], [2.0], [5.0], [7.0]], [0, 0, 1, 1])
    array([[ 0., 23.],
           [23.,  0.]])
    """
    x_nd, y_n = np.asarray(support, np.float64), np.asarray(labels)
    _, index, counts = np.unique(y_n, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise InputError("an unbiased distance needs two shots of every class")
    found = moments_of_support(x_nd, index)
    result: Array = (measured(found.gram) - noise(found.traces, found.counts))[0]
    return result


def unbiased_variance(delta_d: Array, covariances: tuple[Array, Array], shots: tuple[int, int]) -> float:
    """Return the variance of U for two Gaussian classes.

    delta_d: (d,) true difference of means; covariances: two (d, d); shots: of each. With A = S_i/k_i + S_j/k_j:
    Var U = 4 delta^T A delta + 2 tr A^2 + sum_c 2 tr S_c^2 / (k_c^2 (k_c - 1)).
    """
    a = covariances[0] / shots[0] + covariances[1] / shots[1]
    own = sum(2.0 * float((s * s).sum()) / (k * k * (k - 1)) for s, k in zip(covariances, shots, strict=True))
    return 4.0 * float(delta_d @ a @ delta_d) + 2.0 * float((a * a).sum()) + own


def separation_errors(unbiased: Array, found: Moments, variance: Array, squares: Array) -> Array:
    """Return the standard error (E, C, C) of U, by the formula of `unbiased_variance` with estimates put in.

    variance: (E,) per dimension of the frame, for delta^T S delta. squares: (E,) trace of S^2. S shared by classes.
    """
    inverse = noise(np.ones_like(found.counts), found.counts)
    own = noise(1.0 / np.maximum(found.counts - 1, 1), found.counts**2)
    length = np.maximum(unbiased, 0.0) * variance[:, None, None]
    result: Array = np.sqrt(4 * length * inverse + 2 * squares[:, None, None] * (inverse**2 + own))
    return result


@dataclass(frozen=True)
class RatioTable:
    """The correction as the paper's code makes it: simulated ratios of a true to an estimated distance, by snr."""

    snr: Array  # (m,) ascending
    ratio: Array  # (m,)

    def __call__(self, snr: Array) -> Array:
        """Return the ratio at each measured snr: linear between the points, 0 below them, 1 above."""
        found: Array = np.abs(np.interp(snr, self.snr, self.ratio, left=0.0, right=1.0))
        return found


@lru_cache(maxsize=64)
def ratio_table(dimension: int, shots: int, seed: int = 0, points: int = 100, repeats: int = 100) -> RatioTable:
    """Simulate the ratio <v, e> / |e|^2 of a centre v to its estimate e from `shots` noisy points, against |e| / scale.

    Centre of norm 5; noise scales evenly spaced in [0.01, 6]. The mean and the spread of the shots are drawn from
    their own distributions rather than from single shots, which is the same and faster. For one shot the scale is
    the true one. Interpolation is linear: the cubic of the authors' code overshoots between noisy points.

    Source: Bendou et al. 2022 (arXiv:2212.06461), the table of its code (spec 1b.6).
    """
    rng = np.random.default_rng([seed, dimension, shots])
    centre = np.full(dimension, 5.0 / np.sqrt(dimension))
    snr, ratio = np.empty(points), np.empty(points)
    for i, scale in enumerate(np.linspace(0.01, 6.0, points)):
        estimate = centre + scale / np.sqrt(shots) * rng.standard_normal((repeats, dimension))
        length2 = (estimate * estimate).sum(axis=1)
        spread = np.full(repeats, scale)
        if shots > 1:
            within = scale**2 * rng.chisquare((shots - 1) * dimension, repeats)
            between = shots * ((estimate - estimate.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
            spread = np.sqrt((within + between) / (shots * dimension))
        ratio[i] = ((estimate @ centre) / length2).mean()
        snr[i] = (np.sqrt(length2) / spread).mean()
    order = np.argsort(snr, kind="stable")
    return RatioTable(snr[order], ratio[order])


def _none(found: Moments, traces: Array, shots: Array) -> Array:
    return np.sqrt(measured(found.gram))


def _asymptotic(found: Moments, traces: Array, shots: Array) -> Array:
    return np.sqrt(np.maximum(measured(found.gram) - noise(traces, found.counts), 0.0))


def _effective(found: Moments, traces: Array, shots: Array) -> Array:
    unbiased = np.maximum(measured(found.gram) - noise(traces, found.counts), 0.0)
    length = np.sqrt(unbiased + noise(traces, shots))
    result: Array = unbiased / np.where(length > 0, length, 1.0)
    return result


def _table(found: Moments, traces: Array, shots: Array) -> Array:
    if (found.counts != found.counts[:, :1]).any() or (shots != found.counts).any():
        raise OptionError("correction='table' is for one shot count: the same in every class, and no other `shots`")
    distance = np.sqrt(measured(found.gram))
    scale = np.sqrt(noise(traces, np.ones_like(traces)) / found.dimension)
    snr = distance / np.where(scale > 0, scale, 1.0)
    ratios = np.ones_like(snr)
    for k in np.unique(found.counts):
        table = ratio_table(found.dimension, int(k))
        ratios = np.where((found.counts[:, :1, None] == k) & (scale > 0), table(snr), ratios)
    return distance * ratios


# (moments, traces (E, C), shots asked for (E, C)) -> distances (E, C, C) between re-embedded means
CORRECTIONS: dict[str, Callable[[Moments, Array, Array], Array]] = {
    "effective": _effective,  # U / sqrt(U + t): what the estimated direction sees of the true distance
    "table": _table,  # the same by simulation, as in the paper's code
    "asymptotic": _asymptotic,  # sqrt(U): the error with endless shots; far too optimistic for few
    "none": _none,  # the distances as measured
}
FOR_OTHER_SHOTS = ("effective",)


def full_traces(found: Moments, sigma: float | None) -> Array:
    """Return the covariance traces (E, C): d sigma^2, or the estimates; a class of one shot takes the pooled one."""
    if sigma is not None:
        return np.full_like(found.traces, found.dimension * sigma**2)
    free = np.where(found.counts > 1, found.counts - 1, 0.0)
    if (free.sum(axis=1) == 0).any():
        raise DataError(
            "one shot per class says nothing about the spread of a class; give sigma, the within-class standard "
            "deviation per dimension of base classes (thrifty.fewshot.generalization.within_scale)"
        )
    pooled = (free * np.nan_to_num(found.traces)).sum(axis=1, keepdims=True) / free.sum(axis=1, keepdims=True)
    result: Array = np.where(found.counts > 1, np.nan_to_num(found.traces), pooled)
    return result
