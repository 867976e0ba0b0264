"""Training with a teacher: what `--teacher` means for any technique that trains."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from thrifty.errors import KnobError, NoMatch, close_to
from thrifty.objectives.cross_entropy import CrossEntropy
from thrifty.objectives.distillation import Distillation
from thrifty.objectives.features import Teacher, refuse
from thrifty.objectives.graph_distillation import GraphDistillation
from thrifty.objectives.relational_distillation import RelationalDistillation
from thrifty.objectives.weighted_sum import WeightedSum
from thrifty.task import Task
from thrifty.training import Objective, PlainLoss

# What a teacher can give, and the weight of it beside the task's own objective.
TAUGHT: dict[str, tuple[Any, float]] = {
    "distillation": (Distillation, 1.0),
    "graph_distillation": (GraphDistillation, 25.0),
    "relational_distillation": (RelationalDistillation, 25.0),
}


def with_teacher(
    task: Task, teacher: nn.Module, objective: str = "distillation", weight: float | None = None, **knobs: Any
) -> Task:
    """Return the task with the objective: its own (cross-entropy by default) + weight * what the teacher adds.

    Every technique that trains follows it: the recovery of Prune, the training of Quantize, Train. Give the float
    model before its compression as the teacher; a frozen copy of it is kept.

    objective: "distillation" (with alpha = 1: the labels are the business of the task's own objective),
        "graph_distillation" or "relational_distillation".
    weight: at least 0; None = 1, 25 and 25, the values of the sources. knobs: of the objective.
    Raises NoMatch for another objective, KnobError for wrong knobs.
    """
    if objective not in TAUGHT:
        raise NoMatch(f"no objective '{objective}' that has a teacher; {close_to(objective, TAUGHT)}")
    kind, usual = TAUGHT[objective]
    known = [f.name for f in fields(kind) if f.name != "teacher"]
    refuse(kind.__name__, {f"no knob '{k}', {close_to(k, known)}": k in known for k in knobs})
    if objective == "distillation":
        if not task.classes:
            raise KnobError(f"task '{task.name}' has no classes to distil; use 'relational_distillation'")
        knobs = {"alpha": 1.0, **knobs}
    own: Objective = task.objective or (CrossEntropy() if task.classes else PlainLoss(0))
    taught = kind(Teacher.of(teacher), **knobs)
    return replace(task, objective=WeightedSum({own: 1.0, taught: usual if weight is None else weight}))
