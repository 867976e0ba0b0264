"""How far the truth may be from a forecast: the procedure rehearsed in worlds that would have given the same one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from thrifty.fewshot.generalization.distances import full_traces, measured, noise, separation_errors
from thrifty.fewshot.generalization.gaussian import confusions, embed, errors, shared_scale
from thrifty.fewshot.generalization.model import GaussianModel, model_predictions
from thrifty.fewshot.generalization.moments import Moments, square_root
from thrifty.fewshot.preprocess import Array

DRAWS = 5_000  # queries per rehearsal, all classes together
LEAST_DRAWS = 100  # per class
KEPT = 0.2  # share of the rehearsals whose forecast is nearest to the one at hand
_STREAM = 2  # of random numbers; the draws of `confusions` are stream 1
WIDE = 4.0  # standard errors of the distances on either side, within which worlds are drawn


@dataclass(frozen=True)
class Worlds:
    """B possible truths behind one support: Gaussian classes, isotropic in the frame of the means, and outside."""

    centres: Array  # (B, C, C) class means
    inside: Array  # (B,) variance per dimension of the frame, C - 1 of them
    outside: Array  # (B,) variance per outside dimension
    dimensions: int  # outside dimensions, as many as give the measured trace of the squared covariance
    counts: Array  # (C,) shots

    def part(self, keep: np.ndarray) -> Worlds:
        """Return some of the worlds."""
        return replace(self, centres=self.centres[keep], inside=self.inside[keep], outside=self.outside[keep])


def worlds_of(found: Moments, model: GaussianModel, rng: np.random.Generator) -> Worlds:
    """Return `model.rehearsals` worlds for one support (E = 1).

    The overall distance is uniform within WIDE standard errors of the measured one; the pattern of distances is the
    measured one, drawn toward equality as far as it may be chance, and as uncertain as that leaves it; variances
    follow their chi-square laws.
    """
    count, counts = model.rehearsals, found.counts[0]
    traces = full_traces(found, model.sigma)
    unbiased = (measured(found.gram) - noise(traces, found.counts))[0]
    inside = float(model.sigma**2 if model.sigma is not None else shared_scale(found)[0] ** 2)
    rank, total = max(1.0, float(found.rank[0])), float(traces.mean())
    square = float(found.squares[0])
    if model.sigma is not None or not np.isfinite(square):
        square = total**2 / found.dimension
    doubt = separation_errors(unbiased[None], found, np.array([inside]), np.array([square]))[0]
    degrees = float((counts - 1).sum())
    known = model.sigma is not None or degrees == 0
    freedom = np.clip(total**2 / square, 1.0, found.dimension) if square > 0 else 1.0

    def variance(value: float, freedom: float) -> Array:
        return np.full(count, value) if known else value * freedom / rng.chisquare(freedom, count)

    scales = variance(inside, degrees * rank)
    totals = variance(total, degrees * freedom)
    rest, left = max(total - rank * inside, 0.0), found.dimension - rank
    least = rest**2 / left if left > 0 else 0.0  # the square of an isotropic outside
    outside_square = max(square - rank * inside**2, least)
    dimensions = int(np.clip(round(rest**2 / outside_square), 1, left)) if left > 0 and outside_square > 0 else 0
    outside = np.maximum(totals - rank * scales, 0.0) / max(dimensions, 1)
    return Worlds(_centres(unbiased, doubt, count, rng), scales, outside, dimensions, counts)


def _centres(unbiased: Array, doubt: Array, count: int, rng: np.random.Generator) -> Array:
    """Return class means (B, C, C) at distances drawn about those of U (C, C), with standard errors `doubt`."""
    pairs = np.triu_indices(len(unbiased), 1)
    values, variances = unbiased[pairs], doubt[pairs] ** 2
    mean = float(values.mean())
    real = max(0.0, float(values.var()) - float(variances.mean()))
    trust = real / (real + float(variances.mean())) if real > 0 else 0.0
    drawn = np.ones((count, len(values)))
    if mean > 0:
        chance = np.sqrt(trust * variances) / mean * rng.standard_normal(drawn.shape)
        drawn = np.maximum(1.0 + trust * (values / mean - 1.0) + chance, 0.0)
    pattern = np.zeros((count, *unbiased.shape))
    pattern[:, pairs[0], pairs[1]] = pattern[:, pairs[1], pairs[0]] = drawn
    sway = WIDE * float(np.sqrt(variances.mean()))
    low, high = np.sqrt(max(mean - sway, 0.0)), np.sqrt(max(mean, 0.0) + sway)
    result: Array = rng.uniform(low, high, count)[:, None, None] * embed(np.sqrt(pattern))
    return result


def noises_of(worlds: Worlds, rng: np.random.Generator) -> Array:
    """Return standard noise (B, C, C + outside) of class means; the frame lies across (1, ..., 1)."""
    count, ways = worlds.centres.shape[:2]
    found = rng.standard_normal((count, ways, ways + worlds.dimensions))
    found[:, :, :ways] -= found[:, :, :ways].mean(axis=2, keepdims=True)
    found /= np.sqrt(worlds.counts)[:, None]
    return found


def _extended(worlds: Worlds, noises: Array, shots: int, rng: np.random.Generator) -> Array:
    """Return the noise of the means when the support is grown (or cut) to `shots` of every class."""
    k = worlds.counts[:, None]
    fresh = noises_of(worlds, rng) * np.sqrt(k)
    more = np.sqrt(np.maximum(shots - k, 0.0))
    fewer = np.sqrt(np.maximum(1.0 / shots - 1.0 / k, 0.0))
    grown: Array = np.where(shots >= k, (k * noises + more * fresh) / shots, noises + fewer * fresh)
    return grown


def _means(worlds: Worlds, noises: Array) -> Array:
    ways = len(worlds.counts)
    inside, outside = np.sqrt(worlds.inside)[:, None, None], np.sqrt(worlds.outside)[:, None, None]
    means: Array = np.concatenate(
        [worlds.centres + inside * noises[:, :, :ways], outside * noises[:, :, ways:]], axis=2
    )
    return means


def _predicted(found: Moments, model: GaussianModel, means: Array) -> Array:
    """Return the forecasts (B,) of supports with these means, and the measured variances."""
    centred = means - means.mean(axis=1, keepdims=True)
    gram = centred @ centred.transpose(0, 2, 1)
    return errors(model_predictions(_like(found, gram), model)[0])


def _like(found: Moments, gram: Array) -> Moments:
    """Return moments with other means and the variances of one support; scatters turn with the frame."""
    ways = gram.shape[1]
    across = np.eye(ways) - 1.0 / ways
    traces = np.trace(found.scatter, axis1=2, axis2=3)
    scatter = traces[:, :, None, None] * across / max(ways - 1, 1)

    def many(x: Array) -> Array:
        return np.broadcast_to(x, (len(gram), *x.shape[1:]))

    return replace(
        found, gram=gram, traces=many(found.traces), counts=many(found.counts), scatter=many(scatter),
        rank=many(found.rank), squares=many(found.squares),
    )  # fmt: skip


def _true_errors(worlds: Worlds, means: Array, samples: int, seed: int) -> Array:
    """Return the true errors (B,) of nearest mean with these means."""
    ways = len(worlds.counts)
    inner = worlds.centres @ means[:, :, :ways].transpose(0, 2, 1)
    offsets = inner - 0.5 * (means * means).sum(axis=2)[:, None, :]
    centred = means - means.mean(axis=1, keepdims=True)
    inside, outside = centred[:, :, :ways], centred[:, :, ways:]
    covariance = worlds.inside[:, None, None] * (inside @ inside.transpose(0, 2, 1))
    covariance += worlds.outside[:, None, None] * (outside @ outside.transpose(0, 2, 1))
    roots = square_root(covariance)
    noises = np.broadcast_to(roots[:, None], (len(means), ways, ways, ways))
    return errors(confusions(offsets, noises, samples, seed))


def interval(found: Moments, model: GaussianModel, shots: int | None = None) -> tuple[float, float]:
    """Return the ends between which the true error lies with probability about `model.level`, if the model is true.

    Worlds are drawn around the estimates, a support from each; those whose forecast comes out nearest to the one at
    hand are kept, and their true errors, moved along a line to the forecast at hand, give the ends (approximate
    Bayesian computation with regression, Beaumont et al. 2002). The forecasts compared are those of the shared
    covariance and the effective distance, whatever the model says.
    """
    rng = np.random.default_rng([_STREAM, model.seed])
    ways = found.gram.shape[1]
    samples = max(LEAST_DRAWS, DRAWS // ways)
    quick = replace(model, covariance="shared", correction="effective", samples=min(model.samples, samples))
    worlds = worlds_of(found, model, rng)
    noises = noises_of(worlds, rng)
    predicted = _predicted(found, quick, _means(worlds, noises))
    here = float(errors(model_predictions(found, quick)[0])[0])
    keep = np.argsort(np.abs(predicted - here), kind="stable")[: max(2, round(KEPT * len(predicted)))]
    worlds, noises, predicted = worlds.part(keep), noises[keep], predicted[keep]
    if shots is not None:
        noises = _extended(worlds, noises, shots, rng)
    true = _true_errors(worlds, _means(worlds, noises), samples, model.seed + 1)
    spread = float(predicted.var())
    slope = float(((predicted - predicted.mean()) * (true - true.mean())).mean()) / spread if spread > 0 else 0.0
    tail = (1.0 - model.level) / 2.0
    low, high = np.quantile(np.clip(true + slope * (here - predicted), 0.0, 1.0), [tail, 1.0 - tail])
    return float(low), float(high)
