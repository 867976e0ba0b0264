"""The knobs of the forecast, and the forecast of many supports at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.errors import close_to
from thrifty.fewshot.generalization.distances import CORRECTIONS, FOR_OTHER_SHOTS, full_traces
from thrifty.fewshot.generalization.gaussian import COVARIANCES, align, embed, errors, factors, model_confusions
from thrifty.fewshot.generalization.moments import Ints, Moments, moments_of_episodes
from thrifty.fewshot.preprocess import Array, OptionError


@dataclass(frozen=True)
class GaussianModel:
    """How classes are taken to be spread, and how distances between them are corrected.

    Source: Bendou et al. 2022, A Statistical Model for Predicting Generalization in Few-Shot Classification
    (arXiv:2212.06461).
    """

    covariance: str = "shared"  # one of COVARIANCES
    correction: str = "effective"  # one of CORRECTIONS
    sigma: float | None = None  # within-class standard deviation per dimension, from base classes; needed for one shot
    samples: int = 10_000  # draws per class (two classes: exact, none drawn)
    rehearsals: int = 1000  # behind the interval; 0: no interval
    level: float = 0.95  # of the interval
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        bad = []
        if self.covariance not in COVARIANCES:
            bad.append(f"covariance is {self.covariance!r}; {close_to(str(self.covariance), COVARIANCES)}")
        if self.correction not in CORRECTIONS:
            bad.append(f"correction is {self.correction!r}; {close_to(str(self.correction), CORRECTIONS)}")
        if self.sigma is not None and not 0 < self.sigma < np.inf:
            bad.append(f"sigma is {self.sigma}; it must be positive")
        if self.sigma is not None and self.covariance in ("free", "full"):
            bad.append(f"sigma is one scale for all classes; covariance='{self.covariance}' estimates its own")
        if self.samples < 1:
            bad.append(f"samples is {self.samples}; it must be at least 1")
        if self.rehearsals < 0 or 0 < self.rehearsals < 100:
            bad.append(f"rehearsals is {self.rehearsals}; it must be 0 (no interval) or at least 100")
        if not 0 < self.level < 1:
            bad.append(f"level is {self.level}; it must be in (0, 1)")
        if bad:
            raise OptionError("GaussianModel: " + "; ".join(bad))


def model_predictions(found: Moments, model: GaussianModel, shots: int | None = None) -> tuple[Array, Array]:
    """Return the confusions and the corrected distances, both (E, C, C), of supports with these moments.

    shots: predict for this many shots per class instead of those of the support.
    """
    traces = full_traces(found, model.sigma)
    wanted = found.counts if shots is None else np.full_like(found.counts, shots)
    if shots is not None and model.correction not in FOR_OTHER_SHOTS and (wanted != found.counts).any():
        raise OptionError(f"correction='{model.correction}' cannot forecast another shot count; use 'effective'")
    if shots is not None and shots < 1:
        raise OptionError(f"shots is {shots}; it must be at least 1")
    distances = CORRECTIONS[model.correction](found, traces, wanted)
    points = embed(distances)
    if model.covariance == "full":
        points = align(points, found)
    roots = factors(found, model.covariance, model.sigma)
    return model_confusions(points, roots, model.samples, model.seed), distances


def forecast_episodes(
    features: npt.ArrayLike, support: Ints, shots: int | None = None, model: GaussianModel | None = None
) -> Array:
    """Return the predicted error (E,) of each of many supports, computed together.

    features: (n, d). support: (E, C, k) rows of features, as `Episodes.support`. shots: of the forecast, if not k.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((40, 8)) + 3.0 * np.repeat(np.eye(2, 8), 20, axis=0)
    >>> forecast_episodes(x, np.array([[[0, 1, 2], [20, 21, 22]]])).shape
    (1,)
    """
    found = moments_of_episodes(features, support)
    return errors(model_predictions(found, model or GaussianModel(), shots)[0])
