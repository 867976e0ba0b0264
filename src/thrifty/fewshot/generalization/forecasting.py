"""The forecast of a support: predicted error, interval, confusions, and how many more shots would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import need
from thrifty.fewshot.generalization.baselines import leave_one_out
from thrifty.fewshot.generalization.distances import full_traces, measured, noise, separation_errors
from thrifty.fewshot.generalization.gaussian import errors, shared_scale
from thrifty.fewshot.generalization.interval import interval
from thrifty.fewshot.generalization.model import GaussianModel, model_predictions
from thrifty.fewshot.generalization.moments import Moments, moments_of_support
from thrifty.fewshot.preprocess import Array, InputError, OptionError

MOST_SHOTS = 10_000  # beyond this, `shots_needed` says never
LEFT_OUT_SHOTS = 5  # from here, leave-one-out is near enough to the same question to widen the interval


@dataclass(frozen=True)
class Offset:
    """How much forecasts were above the truth, on validation classes, at one number of ways and shots."""

    value: float  # mean of predicted - true error
    half_width: float  # of its 95 % interval
    differences: tuple[float, ...]  # predicted - true error of each episode, ascending
    ways: int
    shots: int  # of the supports
    at: int  # shots forecast
    covariance: str
    correction: str


@dataclass(frozen=True)
class Forecast:
    """What nearest class mean on this support will do on unseen queries, from the support alone.

    `error` is that of the classifier with these shots (or with `shots`), not the one of leave-one-out, which has a
    shot less. With an offset, `low` and `high` are where the differences seen on validation classes put the truth.
    Without, they are the ends that hold if classes are Gaussian with about equal spread, widened, from five shots on,
    to contain the interval of leave-one-out, which holds on features that are not. See docs/generalization.md.
    """

    error: float  # in [0, 1], the offset subtracted
    low: float | None  # ends of the interval; None without rehearsals
    high: float | None
    level: float
    raw_error: float  # before the offset
    left_out: float | None  # leave-one-out error of the support (a shot less); None where a class has one shot
    standard_error: float  # of the sampling alone; 0 for two classes
    shots: tuple[int, ...]  # per class, of the forecast
    classes: npt.NDArray[Any]  # (C,) sorted labels
    confusions: Array  # (C, C) probability that a query of class i is given label j
    distances: Array  # (C, C) corrected
    separations: Array  # (C, C) U, unbiased squared distances; may be negative
    separation_errors: Array  # (C, C) standard errors of U
    centroids: Array  # (C, C - 1) re-embedded means, for pictures

    @property
    def accuracy(self) -> float:
        """1 - error."""
        return 1.0 - self.error

    def worst(self, count: int = 5) -> list[tuple[Any, Any, float]]:
        """Return the pairs most often confused: (class, taken for, probability), most likely first."""
        wrong = self.confusions * (1.0 - np.eye(len(self.classes)))
        order = np.argsort(-wrong, axis=None, kind="stable")[: min(count, wrong.size - len(wrong))]
        pairs = [np.unravel_index(i, wrong.shape) for i in order]
        return [(self.classes[i], self.classes[j], float(wrong[i, j])) for i, j in pairs]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        arrays = ("confusions", "distances", "separations", "separation_errors", "centroids", "classes")
        plain = {k: v for k, v in self.__dict__.items() if k not in arrays}
        return {**plain, "shots": list(self.shots), **{k: getattr(self, k).tolist() for k in arrays}}


@dataclass(frozen=True)
class ShotsNeeded:
    """How many shots per class reach an accuracy; None: more than MOST_SHOTS, or never."""

    accuracy: float
    shots: int | None  # by the forecast
    optimistic: int | None  # by the low end of its interval
    pessimistic: int | None  # by the high end
    best_accuracy: float  # forecast with endless shots
    have: int  # shots of the smallest class of the support

    @property
    def more(self) -> int | None:
        """How many more per class than the support has (0: it is there)."""
        return None if self.shots is None else max(0, self.shots - self.have)


def moments_of(support: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Moments, npt.NDArray[Any]]:
    """Return the moments and the sorted classes of a support, checked; raises InputError for what is not one."""
    x_nd, y_n = np.asarray(support, np.float64), np.asarray(labels)
    if x_nd.ndim != 2 or y_n.shape != x_nd.shape[:1] or not len(y_n):
        raise InputError(f"support has shape {x_nd.shape} and labels {y_n.shape}; they must be (n, d) and (n,)")
    if not np.isfinite(x_nd).all():
        raise InputError(f"support has {int((~np.isfinite(x_nd)).sum())} values that are NaN or infinite")
    classes, index = np.unique(y_n, return_inverse=True)
    if len(classes) < 2:
        raise InputError("a forecast needs at least two classes")
    return moments_of_support(x_nd, index), classes


def forecast(
    support: npt.ArrayLike,
    labels: npt.ArrayLike,
    shots: int | None = None,
    model: GaussianModel | None = None,
    offset: Offset | None = None,
) -> Forecast:
    """Predict the error that nearest class mean built on this support will make on unseen queries.

    support: (n, d) features as the classifier sees them, labels: (n,). Two shots of every class, unless model.sigma
    is given; shots may differ between classes. shots: forecast for a support grown (or cut) to this many per class.
    offset: what validation classes taught (`learn_offset`); subtracted.
    Raises InputError, OptionError.

    Source: Bendou et al. 2022 (arXiv:2212.06461); the interval, the confusions and other shot counts are ours.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((40, 16)) + 4.0 * np.repeat(np.eye(2, 16), 20, axis=0)
    >>> round(forecast(x, [0] * 20 + [1] * 20, model=GaussianModel(rehearsals=0)).error, 3)
    0.0
    """
    model = model or GaussianModel()
    found, classes = moments_of(support, labels)
    return _forecast(found, classes, shots, model, offset, _left_out(support, labels, found))


def _left_out(support: npt.ArrayLike, labels: npt.ArrayLike, found: Moments) -> float | None:
    return leave_one_out(support, labels) if found.counts.min() >= 2 else None


def _forecast(
    found: Moments, classes: npt.NDArray[Any], shots: int | None, model: GaussianModel, offset: Offset | None,
    left_out: float | None,
) -> Forecast:  # fmt: skip
    confusions, distances = model_predictions(found, model, shots)
    raw = float(errors(confusions)[0])
    wanted = found.counts[0] if shots is None else np.full(len(classes), shots)
    shift = check_offset(offset, found, wanted, model)
    low, high = _ends(raw, found, shots, model, offset, left_out)
    unbiased = measured(found.gram) - noise(full_traces(found, model.sigma), found.counts)
    spread, squares = _spread(found, model)
    return Forecast(
        error=_clip(raw - shift),
        low=None if low is None else _clip(low),
        high=None if high is None else _clip(high),
        level=model.level,
        raw_error=raw,
        left_out=left_out,
        standard_error=0.0 if len(classes) == 2 else (raw * (1 - raw) / (len(classes) * model.samples)) ** 0.5,
        shots=tuple(int(k) for k in wanted),
        classes=classes,
        confusions=confusions[0],
        distances=distances[0],
        separations=unbiased[0],
        separation_errors=separation_errors(unbiased, found, spread, squares)[0],
        centroids=picture(distances[0]),
    )


def _ends(
    raw: float, found: Moments, shots: int | None, model: GaussianModel, offset: Offset | None, left_out: float | None
) -> tuple[float | None, float | None]:
    """Return the ends of the interval: from validation episodes where there are any, else from the model."""
    if offset is not None:
        tail = (1.0 - model.level) / 2.0
        below, above = np.quantile(offset.differences, [tail, 1.0 - tail])
        return float(raw - above), float(raw - below)
    if not model.rehearsals:
        return None, None
    down, up = _widening(found, model, left_out)
    low, high = interval(found, model, shots)
    return low - down, high + up


def _widening(found: Moments, model: GaussianModel, left_out: float | None) -> tuple[float, float]:
    """Return how far the interval of leave-one-out reaches below and above that of the model, at the shots had."""
    if left_out is None or found.counts.min() < LEFT_OUT_SHOTS:
        return 0.0, 0.0
    low, high = interval(found, model)
    least, most = wilson(left_out, int(found.counts.sum()), model.level)
    return max(0.0, low - least), max(0.0, most - high)


def wilson(share: float, count: int, level: float) -> tuple[float, float]:
    """Return Wilson's interval of a share seen in `count` trials.

    >>> [round(end, 3) for end in wilson(0.1, 50, 0.95)]
    [0.043, 0.214]
    """
    z2 = float(need("scipy.special", extra="fewshot").ndtri(0.5 + level / 2)) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return middle - half, middle + half


def _spread(found: Moments, model: GaussianModel) -> tuple[Array, Array]:
    """Return the variance in the frame (E,) and the trace of the squared covariance (E,)."""
    if model.sigma is not None:
        return np.array([model.sigma**2]), np.array([found.dimension * model.sigma**4])
    return shared_scale(found) ** 2, np.nan_to_num(found.squares)


def _clip(error: float) -> float:
    return min(1.0, max(0.0, error))


def check_offset(offset: Offset | None, found: Moments, wanted: Array, model: GaussianModel) -> float:
    """Return the offset to subtract; raise OptionError where it was learned for something else."""
    if offset is None:
        return 0.0
    ways = len(wanted)
    facts = {
        "ways": (offset.ways, ways),
        "shots": (offset.shots, sorted({int(k) for k in found.counts[0]})),
        "at": (offset.at, sorted({int(k) for k in wanted})),
        "covariance": (offset.covariance, model.covariance),
        "correction": (offset.correction, model.correction),
    }
    bad = [f"{n} {was}, here {now}" for n, (was, now) in facts.items() if now not in (was, [was])]
    if bad:
        raise OptionError(f"the offset was learned for {'; '.join(bad)}: learn one for this case with learn_offset")
    return offset.value


def picture(distances: Array) -> Array:
    """Return points (C, C - 1) with the given distances, largest spread first, each axis with its largest value
    positive.
    """
    ways = len(distances)
    centre = np.eye(ways) - 1.0 / ways
    values, vectors = np.linalg.eigh(-0.5 * centre @ (distances * distances) @ centre)
    points = (vectors * np.sqrt(values.clip(min=0.0)))[:, ::-1][:, : ways - 1]
    signs = np.sign(np.take_along_axis(points, np.abs(points).argmax(axis=0)[None], axis=0))
    result: Array = points * np.where(signs == 0, 1.0, signs)
    return result


def curve(
    support: npt.ArrayLike,
    labels: npt.ArrayLike,
    shots: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    model: GaussianModel | None = None,
) -> list[Forecast]:
    """Return the forecast at each of several shot counts, from the one support that there is."""
    model = model or GaussianModel()
    found, classes = moments_of(support, labels)
    left_out = _left_out(support, labels, found)
    return [_forecast(found, classes, int(k), model, None, left_out) for k in shots]


def shots_needed(
    support: npt.ArrayLike, labels: npt.ArrayLike, accuracy: float = 0.9, model: GaussianModel | None = None
) -> ShotsNeeded:
    """Return how many shots per class bring nearest class mean to an accuracy in (0, 1).

    The forecast at k' shots falls with k'; the answer is the first k' where it meets 1 - accuracy.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((10, 64)) + 3.0 * np.repeat(np.eye(2, 64), 5, axis=0)
    >>> needed = shots_needed(x, [0] * 5 + [1] * 5, 0.9, GaussianModel(rehearsals=0))
    >>> needed.have, needed.best_accuracy > 0.9, needed.shots is not None
    (5, True, True)
    """
    if not 0 < accuracy < 1:
        raise OptionError(f"accuracy is {accuracy}; it must be in (0, 1)")
    model = model or GaussianModel()
    found, _ = moments_of(support, labels)

    def error(shots: int) -> float:
        return float(errors(model_predictions(found, model, shots)[0])[0])

    target = 1.0 - accuracy
    quick = model.rehearsals == 0
    down, up = (0.0, 0.0) if quick else _widening(found, model, _left_out(support, labels, found))
    return ShotsNeeded(
        accuracy=accuracy,
        shots=_first(lambda k: error(k) <= target),
        optimistic=None if quick else _first(lambda k: interval(found, model, k)[0] - down <= target),
        pessimistic=None if quick else _first(lambda k: interval(found, model, k)[1] + up <= target),
        best_accuracy=1.0 - error(10**12),
        have=int(found.counts.min()),
    )


def _first(meets: Any) -> int | None:
    """Return the first k in 1..MOST_SHOTS that meets a condition which stays met once it is, or None."""
    high = 1
    while not meets(high):
        if high >= MOST_SHOTS:
            return None
        high = min(2 * high, MOST_SHOTS)
    low = high // 2  # not met there (or 0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
