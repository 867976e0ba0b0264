"""The forecast tied to leave-one-out: for features that are not Gaussian, with five classes or more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.generalization.baselines import leave_one_out
from thrifty.fewshot.generalization.forecasting import (
    Forecast,
    ShotsNeeded,
    curve,
    forecast,
    moments_of,
    shots_needed,
)
from thrifty.fewshot.generalization.model import GaussianModel
from thrifty.fewshot.preprocess import InputError, OptionError


@dataclass(frozen=True)
class Anchor:
    """By how much, in log odds of the error, something better known was above the forecast of the same thing."""

    shift: float
    left_out: float | None  # leave-one-out error of the support
    forecast: float  # what the model says of `shots` shots
    shots: int  # at which the two were compared; for leave-one-out one less than the support has

    def error(self, error: float) -> float:
        """Return an error of the model, moved.

        >>> round(Anchor(math.log(2.0), 0.0, 0.0, 1).error(0.5), 3)
        0.667
        """
        return _share(_odds(error) + self.shift)

    def before(self, error: float) -> float:
        """Return the error of the model that `error` moves to this one."""
        return _share(_odds(error) - self.shift)


def learn_anchor(support: npt.ArrayLike, labels: npt.ArrayLike, model: GaussianModel | None = None) -> Anchor:
    """Return how far leave-one-out is from the forecast for a shot less, which answers the same question.

    support: (n, d), labels: (n,), two shots of each class at least. Leave-one-out is taken to be no nearer to 0 or 1
    than half a shot. Raises InputError.
    """
    found, _ = moments_of(support, labels)
    if found.counts.min() < 2:
        raise InputError("leave-one-out needs two shots of every class")
    shots = max(1, round(float(1.0 / np.mean(1.0 / found.counts))) - 1)
    quick = replace(model or GaussianModel(), rehearsals=0)
    said = forecast(support, labels, shots, quick).raw_error
    half = 0.5 / float(found.counts.sum())
    seen = leave_one_out(support, labels)
    shift = _odds(min(max(seen, half), 1.0 - half)) - _odds(min(max(said, half), 1.0 - half))
    return Anchor(shift, seen, said, shots)


def anchor_of_offset(found: Forecast) -> Anchor:
    """Return what an offset from validation classes did to a forecast, as an anchor for other shot counts."""
    half = 1e-3
    moved, said = (min(max(e, half), 1.0 - half) for e in (found.error, found.raw_error))
    return Anchor(_odds(moved) - _odds(said), found.left_out, found.raw_error, min(found.shots))


def anchored(found: Forecast, anchor: Anchor) -> Forecast:
    """Return a forecast with its error moved, and its interval widened to contain it; confusions stay.

    Source: ours. On features of networks the Gaussian model is optimistic when there are many classes;
    leave-one-out is not, but answers for a shot less. The difference of the two, seen where both answer, is
    added where only the model does. Not for forecasts with an offset from validation classes: that is the better
    correction.
    """
    if found.raw_error != found.error:
        raise OptionError("this forecast has an offset from validation classes; anchor one without")
    error = anchor.error(found.raw_error)
    low = None if found.low is None else min(found.low, error)
    high = None if found.high is None else max(found.high, error)
    return replace(found, error=error, low=low, high=high)


def anchored_curve(
    support: npt.ArrayLike, labels: npt.ArrayLike, shots: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    model: GaussianModel | None = None,
) -> list[Forecast]:  # fmt: skip
    """Return the anchored forecast at each of several shot counts."""
    anchor = learn_anchor(support, labels, model)
    return [anchored(f, anchor) for f in curve(support, labels, shots, model)]


def anchored_shots_needed(
    support: npt.ArrayLike, labels: npt.ArrayLike, accuracy: float = 0.9, model: GaussianModel | None = None,
    anchor: Anchor | None = None,
) -> ShotsNeeded:  # fmt: skip
    """Return how many shots per class bring the anchored forecast to an accuracy in (0, 1).

    anchor: None learns it from the support. The optimistic and pessimistic ends are those of the model's interval, with
    the answer between them.
    """
    if not 0 < accuracy < 1:
        raise OptionError(f"accuracy is {accuracy}; it must be in (0, 1)")
    model = model or GaussianModel()
    anchor = anchor or learn_anchor(support, labels, model)
    moved = shots_needed(support, labels, 1.0 - anchor.before(1.0 - accuracy), replace(model, rehearsals=0))
    ends = shots_needed(support, labels, accuracy, model)
    never = math.inf
    shots = never if moved.shots is None else moved.shots
    least = min(shots, never if ends.optimistic is None else ends.optimistic)
    most = max(shots, never if ends.pessimistic is None else ends.pessimistic)
    return ShotsNeeded(
        accuracy=accuracy,
        shots=moved.shots,
        optimistic=None if model.rehearsals == 0 or least == never else int(least),
        pessimistic=None if model.rehearsals == 0 or most == never else int(most),
        best_accuracy=1.0 - anchor.error(1.0 - moved.best_accuracy),
        have=moved.have,
    )


def _odds(share: float) -> float:
    share = min(max(share, 1e-9), 1.0 - 1e-9)
    return math.log(share / (1.0 - share))


def _share(odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-odds))
