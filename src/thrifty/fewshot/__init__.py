"""Few labels: scikit-learn estimators on plain feature arrays, episodes to judge them, and forecasts."""

from thrifty.fewshot.classifier import FewShotClassifier
from thrifty.fewshot.easy import Crops, augmented_shots, average_views, ensemble
from thrifty.fewshot.episodes import (
    Episodes,
    Interval,
    accuracies,
    dirichlet,
    evaluate,
    mean_interval,
    meta_dataset,
    uniform,
)
from thrifty.fewshot.generalization import Forecast, GaussianModel, curve, forecast, shots_needed
from thrifty.fewshot.logistic_probe import LogisticProbe
from thrifty.fewshot.nearest_class_mean import NearestClassMean
from thrifty.fewshot.on_chip import OnChipAnchors, OnChipCodes
from thrifty.fewshot.preprocess import base_mean, preprocess
from thrifty.fewshot.soft_kmeans import SoftKMeans
from thrifty.fewshot.text_statistics import TextStatistics
from thrifty.fewshot.tilda import Tilda
from thrifty.fewshot.unknown import WithUnknown

__all__ = [
    "ESTIMATORS",
    "Crops",
    "Episodes",
    "Forecast",
    "GaussianModel",
    "Interval",
    "LogisticProbe",
    "NearestClassMean",
    "OnChipAnchors",
    "OnChipCodes",
    "SoftKMeans",
    "TextStatistics",
    "Tilda",
    "WithUnknown",
    "accuracies",
    "augmented_shots",
    "average_views",
    "base_mean",
    "curve",
    "dirichlet",
    "ensemble",
    "evaluate",
    "forecast",
    "mean_interval",
    "meta_dataset",
    "preprocess",
    "shots_needed",
    "uniform",
]

ESTIMATORS: dict[str, type[FewShotClassifier]] = {
    "nearest_class_mean": NearestClassMean,
    "logistic_probe": LogisticProbe,
    "soft_kmeans": SoftKMeans,
    "text_statistics": TextStatistics,
    "tilda": Tilda,
    "on_chip_anchors": OnChipAnchors,
    "on_chip_codes": OnChipCodes,
}
