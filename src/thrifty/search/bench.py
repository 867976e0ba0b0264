"""What a recipe gives: a pure function of (recipe, model, task, target), measured on its program."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from thrifty import deploy
from thrifty.capture import capture
from thrifty.compress import QuantizedModel, compress
from thrifty.compress.teach import taught_in, trains
from thrifty.cost import Cost, count
from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.program import Program
from thrifty.deploy.run import dequantize, quantize_input
from thrifty.errors import MissingExtra, StoreError, ThriftyError
from thrifty.graph import Graph
from thrifty.objectives import Teaching
from thrifty.recipe import Recipe
from thrifty.search.recipes import recipe_of
from thrifty.search.space import Point, Probe, Trial
from thrifty.search.state import State
from thrifty.task import Split, Task

Array = npt.NDArray[np.float32]

PROBED = 512  # validation examples that a probe is scored on
KEPT_BYTES = 256 << 20  # of edited models in memory


@dataclass
class Bench:
    """Builds and measures points of one search; equal points give equal results."""

    model: nn.Module
    task: Task
    target: str
    state: State
    reference: float = 0.0  # validation score of the model as it is
    epochs: int = 2
    teaching: Teaching | None = None  # who teaches the recovery
    taught: Task | None = None  # the task as it is taught; None: nobody teaches
    say: Callable[[str], None] = lambda _text: None
    models: dict[str, nn.Module] = field(default_factory=dict)  # the latest, by recipe

    def measure(self, point: Point) -> Trial:
        """Return the trial of a point: from the state where it is known, else built, scored and measured now."""
        if point in self.state.trials:
            return self.state.trials[point]
        recipe = recipe_of(point, self.epochs)
        start = time.perf_counter()
        score, cost, error = None, Cost(), ""
        try:
            program = self.program(recipe)
            cost = replace(
                deploy.measure(program, self.target),
                activation_bytes=count(self.graph(recipe)).activation_bytes,
            )
            score = self.task.score_outputs(self.outputs(program, recipe, "validation"), "validation")
        except (StoreError, MissingExtra):
            raise
        except ThriftyError as err:
            error = str(err)
        drop = None if score is None else self.reference - score
        return self.state.add_trial(
            Trial(point, recipe.to_toml(), cost, score, drop, time.perf_counter() - start, error)
        )

    def probe(self, point: Point) -> Probe:
        """Return the counted cost of a point and its drop on a part of validation, without training."""
        if point in self.state.probes:
            return self.state.probes[point]
        recipe = recipe_of(point.moved("train", None), 0)
        try:
            model = self.edited(recipe)
            found = Probe(
                point,
                count(graph_of(model, self.task)),
                self.part_reference - self.part.score(_soft(model)),
            )
        except (StoreError, MissingExtra):
            raise
        except ThriftyError as err:
            found = Probe(point, Cost(), None, str(err))
        return self.state.add_probe(found)

    def edited(self, recipe: Recipe) -> nn.Module:
        """Return the model after a recipe; trained ones are read from the state folder when they are there."""
        key = recipe.to_toml()
        if key not in self.models:
            self.models[key] = self._edited(recipe, key)
            while len(self.models) > 1 and sum(map(_bytes, self.models.values())) > KEPT_BYTES:
                del self.models[next(iter(self.models))]
        return self.models[key]

    def _edited(self, recipe: Recipe, key: str) -> nn.Module:
        if not recipe.steps:
            return copy.deepcopy(self.model).eval()
        folder = self.state.model_folder(key) if trains(recipe) else None
        if folder is not None and folder.exists():
            from thrifty.store import load

            return load(folder, lambda: copy.deepcopy(self.model)).eval()
        before = self.edited(Recipe(recipe.steps[:-1]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.task.seed)
            model = compress(before, Recipe(recipe.steps[-1:]), self.task_of(recipe), teaching=None)
        if folder is not None:
            from thrifty.store import save

            save(model, folder)
        return model

    def task_of(self, recipe: Recipe) -> Task:
        """Return the task that the last step of a recipe trains on: with the teacher, where that has its place."""
        taught = self.taught is not None and taught_in(recipe, self.teaching)
        return self.taught if taught and self.taught is not None else self.task

    def untaught(self) -> Bench:
        """Return a bench that trains without the teacher, with a state of its own beside this one's."""
        folder = self.state.folder
        state = State.open(None if folder is None else folder / "without_teacher", {"search": "the same"})
        return replace(self, taught=None, teaching=None, state=state, models={})

    def graph(self, recipe: Recipe) -> Graph:
        """Return the graph of the model after a recipe."""
        return graph_of(self.edited(recipe), self.task)

    def program(self, recipe: Recipe) -> Program:
        """Return the program of the model after a recipe."""
        return lower(self.graph(recipe), "model")

    def outputs(self, program: Program, recipe: Recipe, split: str) -> Array:
        """Return the deployed program's real outputs on a split (n, ...): from its C where there is a compiler."""
        x = self.task.split(split).x.numpy()
        try:
            stored = run_host(program, quantize_input(program, x))
        except MissingExtra:
            return self.task.outputs(self.edited(recipe), split)
        return np.asarray(dequantize(program, program.output, stored), dtype=np.float32)

    @property
    def part(self) -> Task:
        """The task with an even part of validation, for probes."""
        x, y = self.task.validation.x, self.task.validation.y
        step = max(1, len(y) // PROBED)
        return replace(self.task, validation=Split(x[::step], y[::step]))

    @property
    def part_reference(self) -> float:
        """The reference score on that part."""
        if "probe_reference" not in self.state.facts:
            self.state.add_fact("probe_reference", self.part.score(self.model))
        return float(self.state.facts["probe_reference"])


def graph_of(model: nn.Module, task: Task) -> Graph:
    """Return the graph of a model; a quantised one knows its own, without an export."""
    return model.formatted() if isinstance(model, QuantizedModel) else capture(model, task.example)


def _soft(model: nn.Module) -> nn.Module:
    """Return the model with its integers computed in floats, which is faster and nearly the same: for ranking only."""
    if isinstance(model, QuantizedModel):
        model = copy.deepcopy(model)
        model.hard = False
    return model


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
