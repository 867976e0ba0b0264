"""Training with a teacher: what `--teacher` means for any technique that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
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
# Knobs of recovery training, unless it says otherwise: measured, see docs/objectives/teacher.md.
RECOVERY: dict[str, dict[str, Any]] = {"distillation": {"temperature": 2.0}}
TRIED = 4  # training rows on which a teacher is tried before any work


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


@dataclass(frozen=True)
class Teaching:
    """Who teaches the training in which a compressed model recovers, and what is asked of it.

    The default is the float model before its compression, and its class probabilities; for tasks without classes, or
    with an objective of their own, there is no default.
    """

    teacher: nn.Module | None = field(default=None, repr=False)  # None = the float model before its compression
    objective: str = "distillation"  # one of TAUGHT
    weight: float | None = None  # beside the task's own objective; None = as in with_teacher
    knobs: Mapping[str, Any] = field(default_factory=dict)  # of the objective; distillation: temperature 2 by default
    compare: bool = True  # train without the teacher too, say what it bought, and keep what scores higher

    @property
    def name(self) -> str:
        """How reports call it."""
        who = "the float model" if self.teacher is None else type(self.teacher).__name__
        return f"{self.objective.replace('_', ' ')} from {who}"

    def task(self, task: Task, model: nn.Module) -> Task | None:
        """Return the task as the teacher teaches it; None where there is no teacher.

        model: the float model before its compression. It is tried on some rows, so that what does not fit is refused
        before any work: raises what `with_teacher` and the objective raise.
        """
        if self.teacher is None and (not task.classes or task.objective is not None):
            return None
        teacher = model if self.teacher is None else self.teacher
        knobs = {**RECOVERY.get(self.objective, {}), **self.knobs}
        taught = with_teacher(task, teacher, self.objective, self.weight, **knobs)
        modes = {m: m.training for m in model.modules()}
        device = next((t.device for t in model.parameters()), task.train.x.device)
        assert taught.objective is not None
        try:
            with torch.no_grad():
                taught.objective.loss(model.eval(), task.train.x[:TRIED].to(device), task.train.y[:TRIED].to(device))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return taught


FLOAT_MODEL = Teaching()
