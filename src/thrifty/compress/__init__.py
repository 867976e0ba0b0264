"""Techniques, frozen dataclasses with `edit(model, task)`, and `compress`, which applies a recipe of them."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thrifty.capture import capture
from thrifty.compress.fake_quantize import WeightQuantizer
from thrifty.compress.lossless import Lossless
from thrifty.compress.prune import Prune
from thrifty.compress.quantize import Quantize
from thrifty.compress.quantized_model import QuantizedModel
from thrifty.compress.train import Train
from thrifty.cost import count
from thrifty.errors import DataError
from thrifty.recipe import Recipe, Technique, technique_name

if TYPE_CHECKING:
    from thrifty.report import Report
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


def compress(model: nn.Module, recipe: Recipe, task: Task, report: Report | None = None) -> nn.Module:
    """Apply the techniques of a recipe in order, each to a copy, and return the result in eval mode.

    report: gets a row for the start and one for each step: knobs, counted cost, validation score, seconds.
    The caller's model never changes. Raises what the techniques raise; DataError when a step changes the
    shape of the output, which is a fault of that technique.
    """
    shape = _output_shape(model, task.example)
    if report is not None and not report.rows:
        report.add("start", count(capture(model, task.example)), task.score(model))
    result = model
    for step in recipe:
        start = time.perf_counter()
        result = step.edit(result, task)
        seconds = time.perf_counter() - start
        if _output_shape(result, task.example) != shape:
            raise DataError(f"{label(step)} changed the output from {shape} to {_output_shape(result, task.example)}")
        if report is not None:
            cost, score = count(capture(result, task.example)), task.score(result)
            report.add(label(step), cost, score, seconds, knobs=asdict(step))  # type: ignore[call-overload]
    return copy.deepcopy(model).eval() if result is model else result.eval()


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
