"""What validation classes teach: the mean error of the forecast, and the within-class scale for single shots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.episodes import Episodes, accuracies, mean_interval, uniform
from thrifty.fewshot.generalization.forecasting import Offset
from thrifty.fewshot.generalization.model import GaussianModel, forecast_episodes
from thrifty.fewshot.preprocess import Array, InputError

MOST_QUERIES = 200  # per class, behind a true error


@dataclass(frozen=True)
class Trial:
    """Forecasts beside what came true, over episodes."""

    predicted: Array  # (E,) errors
    true: Array  # (E,) errors on the queries
    episodes: Episodes  # support of the classifier (`at` shots)
    shots: int  # of the supports behind the forecasts


def trial(
    features: npt.ArrayLike, labels: npt.ArrayLike, ways: int, shots: int, rng: np.random.Generator,
    *, at: int | None = None, episodes: int = 200, model: GaussianModel | None = None,
) -> Trial:  # fmt: skip
    """Forecast `episodes` supports of `shots` shots, and measure what nearest class mean does with `at` shots.

    features: (n, d), labels: (n,). at: None is `shots`. The true error is measured on up to MOST_QUERIES other
    samples of each class.
    """
    at = shots if at is None else at
    sizes = np.unique(np.asarray(labels), return_counts=True)[1]
    queries = int(min(sizes.min() - max(at, shots), MOST_QUERIES))
    if queries < 1:
        raise InputError(f"the smallest class has {sizes.min()} samples; {max(at, shots)} shots leave none to judge")
    drawn = uniform(labels, ways, max(at, shots), queries, episodes, rng)
    judged = Episodes(drawn.classes, drawn.support[:, :, :at], drawn.query)
    predicted = forecast_episodes(features, drawn.support[:, :, :shots], None if at == shots else at, model)
    return Trial(predicted, 1.0 - accuracies(features, judged), judged, shots)


def learn_offset(
    features: npt.ArrayLike, labels: npt.ArrayLike, ways: int, shots: int, rng: np.random.Generator,
    *, at: int | None = None, episodes: int = 200, model: GaussianModel | None = None,
) -> Offset:  # fmt: skip
    """Return the mean of predicted - true error over episodes of validation classes.

    features: (n, d), labels: (n,): of classes that the task to forecast does not have; otherwise it leaks.
    Source: Bendou et al. 2022 (arXiv:2212.06461), the "unbiased" columns of its code.
    """
    model = model or GaussianModel()
    found = trial(features, labels, ways, shots, rng, at=at, episodes=episodes, model=model)
    differences = found.predicted - found.true
    mean = mean_interval(differences)
    return Offset(
        mean.mean, mean.half_width, tuple(float(d) for d in np.sort(differences)), ways, shots,
        shots if at is None else at, model.covariance, model.correction,
    )  # fmt: skip


def within_scale(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the within-class standard deviation per dimension, pooled: `GaussianModel.sigma` from base classes.

    features: (n, d), labels: (n,), two samples of some class at least.

    >>> within_scale([[0.0], [2.0], [5.0], [7.0]], [0, 0, 1, 1]) ** 2
    2.0000000000000004
    """
    x_nd, y_n = np.asarray(features, np.float64), np.asarray(labels)
    classes, index, counts = np.unique(y_n, return_inverse=True, return_counts=True)
    freedom = len(y_n) - len(classes)
    if freedom < 1:
        raise InputError("the within-class scale needs two samples of some class")
    sums = np.zeros((len(classes), x_nd.shape[1]))
    np.add.at(sums, index, x_nd)
    rest = x_nd - (sums / counts[:, None])[index]
    return float(np.sqrt((rest * rest).sum() / (freedom * x_nd.shape[1])))
