"""Class names that help few-shot learning: from text to the mean and spread of a class's features."""

from thrifty.fewshot.text_statistics.estimator import TextStatistics
from thrifty.fewshot.text_statistics.fusion import Choice, choose_on_classes, closed_alpha
from thrifty.fewshot.text_statistics.learning import TextToStatistics, learn_statistics
from thrifty.fewshot.text_statistics.named_features import (
    NamedFeatures,
    Selection,
    class_statistics,
    split_classes,
)
from thrifty.fewshot.text_statistics.perceptron import Perceptron
from thrifty.fewshot.text_statistics.regressors import Ridge
from thrifty.fewshot.text_statistics.texts import embed_descriptions, embed_names

__all__ = [
    "Choice",
    "NamedFeatures",
    "Perceptron",
    "Ridge",
    "Selection",
    "TextStatistics",
    "TextToStatistics",
    "choose_on_classes",
    "class_statistics",
    "closed_alpha",
    "embed_descriptions",
    "embed_names",
    "learn_statistics",
    "split_classes",
]
