"""Techniques, frozen dataclasses with `edit(model, task)`, and `compress`, which applies a recipe of them."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thrifty.capture import capture
from thrifty.compress.fake_quantize import WeightQuantizer
from thrifty.compress.lossless import Lossless
from thrifty.compress.prune import Prune
from thrifty.compress.quantize import Quantize
from thrifty.compress.quantized_model import QuantizedModel
from thrifty.compress.teach import Lesson, parted, trains
from thrifty.compress.train import Train
from thrifty.cost import count
from thrifty.errors import DataError
from thrifty.objectives.teaching import FLOAT_MODEL, Teaching
from thrifty.recipe import Recipe, Technique, technique_name
from thrifty.report import Report, Row

if TYPE_CHECKING:
    from thrifty.task import Task

__all__ = [
    "PARAMETRISATIONS",
    "TECHNIQUES",
    "WRAPPERS",
    "Lossless",
    "Prune",
    "Quantize",
    "QuantizedModel",
    "Train",
    "compress",
]

# What a recipe can name. Each class has `edit(model, task)` and `example()`, an instance for the contract
# tests.
TECHNIQUES: dict[str, Any] = {
    "prune": Prune,
    "lossless": Lossless,
    "quantize": Quantize,
    "train": Train,
}
# What `store` needs to rebuild an edited model: each class has `spec()` and `from_spec(module, spec)`.
WRAPPERS: dict[str, Any] = {"QuantizedModel": QuantizedModel}
PARAMETRISATIONS: dict[str, Any] = {"WeightQuantizer": WeightQuantizer}


def compress(
    model: nn.Module,
    recipe: Recipe,
    task: Task,
    report: Report | None = None,
    teaching: Teaching | None = FLOAT_MODEL,
) -> nn.Module:
    """Apply the techniques of a recipe in order, each to a copy, and return the result in eval mode.

    report: gets a row for the start and one for each step: knobs, counted cost, validation score, seconds.
    teaching: who teaches the trainings. The default is the float model, for those behind the trainings at the start
        of the recipe, which make it; None = nobody. The recipe is then also carried out without the teacher, what
        scores higher on validation is kept, and the report says both scores (`compare=False` spares that).
    The caller's model never changes. Raises what the techniques raise; DataError when a step changes the
    shape of the output, which is a fault of that technique.
    """
    if report is not None and not report.rows:
        report.add("start", count(capture(model, task.example)), task.score(model))
    first, rest = parted(recipe, teaching)
    begun = _applied(model, first, task, report is not None)
    taught = teaching.task(task, begun.model) if teaching is not None and trains(rest) else None
    done = _applied(begun.model, rest, taught or task, report is not None)
    if taught is not None and teaching is not None:
        alone = _applied(begun.model, rest, task, report is not None) if teaching.compare else None
        lesson = Lesson(teaching.name, task.score(done.model), None if alone is None else task.score(alone.model))
        done = done if alone is None or lesson.kept else alone
        if report is not None:
            lesson.tell(report)
    if report is not None:
        report.rows.extend([*begun.rows, *done.rows])
    return copy.deepcopy(model).eval() if done.model is model else done.model.eval()


@dataclass(frozen=True)
class _Applied:
    """A model after some steps, and their rows for a report."""

    model: nn.Module
    rows: tuple[Row, ...]


def _applied(model: nn.Module, recipe: Recipe, task: Task, told: bool) -> _Applied:
    """Apply the steps of a recipe; told: make rows."""
    shape, rows, result = _output_shape(model, task.example), [], model
    for step in recipe:
        start = time.perf_counter()
        result = step.edit(result, task)
        seconds = time.perf_counter() - start
        if _output_shape(result, task.example) != shape:
            raise DataError(f"{label(step)} changed the output from {shape} to {_output_shape(result, task.example)}")
        if told:
            cost, score = count(capture(result, task.example)), task.score(result)
            rows.append(Row(label(step), cost, score, seconds, asdict(step)))  # type: ignore[call-overload]
    return _Applied(result, tuple(rows))


def label(step: Technique) -> str:
    """Return the name of a step in reports: the technique and its first knob.

    >>> label(Quantize(bits=8))
    'quantize 8'
    """
    first = next(iter(fields(step)), None)  # type: ignore[arg-type]  # Recipe accepts dataclasses only
    return technique_name(step) if first is None else f"{technique_name(step)} {getattr(step, first.name)}"


def _output_shape(model: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs for one example; the model and its mode stay as they are."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        out = twin(example)
    return [tuple(o.shape) for o in (out if isinstance(out, (tuple, list)) else [out])]
