"""What training minimises: one objective, one file. `Task.fit(objective=...)` takes any of them."""

from __future__ import annotations

from typing import Any

from thrifty.objectives.cross_entropy import CrossEntropy
from thrifty.objectives.distillation import Distillation
from thrifty.objectives.features import Teacher
from thrifty.objectives.graph_distillation import GraphDistillation
from thrifty.objectives.graph_smoothness import GraphSmoothness, k_nearest, nearest_mean
from thrifty.objectives.relational_distillation import RelationalDistillation
from thrifty.objectives.teaching import TAUGHT, Teaching, with_teacher
from thrifty.objectives.weighted_sum import WeightedSum

__all__ = [
    "OBJECTIVES",
    "TAUGHT",
    "CrossEntropy",
    "Distillation",
    "GraphDistillation",
    "GraphSmoothness",
    "RelationalDistillation",
    "Teacher",
    "Teaching",
    "WeightedSum",
    "k_nearest",
    "nearest_mean",
    "with_teacher",
]

# Frozen dataclasses with `loss(model, x, y)`, and `example(teacher)`, an instance for the contract tests.
OBJECTIVES: dict[str, Any] = {
    "cross_entropy": CrossEntropy,
    "distillation": Distillation,
    "graph_distillation": GraphDistillation,
    "relational_distillation": RelationalDistillation,
    "graph_smoothness": GraphSmoothness,
    "weighted_sum": WeightedSum,
}
