"""Predicting how well a few-shot classifier will do, from its support alone."""

from thrifty.fewshot.generalization.baselines import (
    Line,
    davies_bouldin,
    leave_one_out,
    leave_one_out_episodes,
    leave_one_shot_out,
)
from thrifty.fewshot.generalization.distances import (
    CORRECTIONS,
    RatioTable,
    ratio_table,
    unbiased_squared_distances,
    unbiased_variance,
)
from thrifty.fewshot.generalization.forecasting import (
    Forecast,
    Offset,
    ShotsNeeded,
    curve,
    forecast,
    shots_needed,
)
from thrifty.fewshot.generalization.gaussian import COVARIANCES
from thrifty.fewshot.generalization.model import GaussianModel, forecast_episodes
from thrifty.fewshot.generalization.offsets import Trial, learn_offset, trial, within_scale

__all__ = [
    "CORRECTIONS",
    "COVARIANCES",
    "Forecast",
    "GaussianModel",
    "Line",
    "Offset",
    "RatioTable",
    "ShotsNeeded",
    "Trial",
    "curve",
    "davies_bouldin",
    "forecast",
    "forecast_episodes",
    "learn_offset",
    "leave_one_out",
    "leave_one_out_episodes",
    "leave_one_shot_out",
    "ratio_table",
    "shots_needed",
    "trial",
    "unbiased_squared_distances",
    "unbiased_variance",
    "within_scale",
]
