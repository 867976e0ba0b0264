"""The end of a search, once: the choice, the test split, the proof on the target, the report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from thrifty import deploy
from thrifty.budget import Budget, Violation
from thrifty.capture import capture
from thrifty.compress.quantize import Quantize
from thrifty.compress.teach import Lesson, taught_in
from thrifty.cost import count
from thrifty.deploy import Deployment
from thrifty.deploy.fidelity import layer_fidelity
from thrifty.deploy.lower import lower
from thrifty.deploy.program import Program
from thrifty.deploy.run import predict
from thrifty.errors import ThriftyError
from thrifty.recipe import Recipe, knobs_of, technique_name
from thrifty.report import Candidate, Parity, Report, Table
from thrifty.search.bench import Bench, graph_of
from thrifty.search.explore import Sensitivity
from thrifty.search.recipes import name_of, recipe_of
from thrifty.search.space import Goal, Point, Trial, cheapest, nearest, pareto
from thrifty.task import Task

Array = npt.NDArray[np.float32]

PROVEN_ON_TARGET = 8  # real samples that the emulated target runs at the end
PROVEN_ON_HOST = 256


@dataclass(frozen=True)
class Result:
    """What a search found: the chosen recipe and model, everything that was tried, and the report.

    `feasible` says whether the chosen one keeps the whole budget on validation; if not, it is the nearest, and
    `violations` says what it exceeds.
    """

    model: nn.Module
    recipe: Recipe
    report: Report
    chosen: Trial
    trials: tuple[Trial, ...]
    pareto: tuple[Trial, ...]
    violations: tuple[Violation, ...]
    program: Program
    deployment: Deployment | None = None
    interrupted: bool = False

    @property
    def feasible(self) -> bool:
        """Whether the chosen recipe keeps the budget."""
        return not self.violations

    def __str__(self) -> str:
        return self.report.verdict


@dataclass(frozen=True)
class Ending:
    """What is known when the search is over."""

    bench: Bench
    trials: tuple[Trial, ...]
    budget: Budget  # with the memory of the board
    target: str
    table: Sequence[Sensitivity]
    notes: Sequence[str] = ()
    interrupted: bool = False
    folder: Path | None = None  # where the C project goes
    lesson: Lesson | None = None  # what the teacher bought

    def compared(self, say: Callable[[str], None] | None) -> Ending:
        """Carry out the chosen recipe without its teacher too, and end with what scores higher on validation.

        say: is told what goes on; None = there is no time for that.
        """
        bench, teaching = self.bench, self.bench.teaching
        chosen = choose(self.trials, self.budget)
        recipe = recipe_of(chosen.point, bench.epochs)
        if bench.taught is None or teaching is None or not taught_in(recipe, teaching) or chosen.score is None:
            return self
        if not teaching.compare or self.interrupted or say is None:
            return replace(self, lesson=Lesson(teaching.name, chosen.score, None))
        say(f"{name_of(chosen.point)}, without the teacher")
        alone = bench.untaught()
        try:
            trial = alone.measure(chosen.point)
        except KeyboardInterrupt:
            note = "the comparison with training without the teacher was interrupted"
            return replace(self, interrupted=True, notes=(*self.notes, note))
        if trial.score is None:
            return replace(self, lesson=Lesson(teaching.name, chosen.score, None))
        lesson = Lesson(teaching.name, chosen.score, trial.score)
        if lesson.kept:
            return replace(self, lesson=lesson)
        trials = tuple(trial if t is chosen else t for t in self.trials)
        return replace(self, bench=alone, trials=trials, lesson=lesson)

    def result(self) -> Result:
        """Choose, prove, touch the test split, and report."""
        bench, budget = self.bench, self.budget
        chosen = choose(self.trials, budget)
        recipe = recipe_of(chosen.point, bench.epochs)
        program = bench.program(recipe)
        front = pareto(self.trials)
        report = Report(
            title=f"optimize {type(bench.model).__name__} for {self.target}", budget=budget, target=self.target,
            seed=bench.task.seed, metric=_metric_name(bench.task),
        )  # fmt: skip
        if version := deploy.compiler_version(self.target):
            report.environment["compiler"] = version
        self._rows(report, recipe, chosen)
        report.candidates.extend(_candidate(t, t is chosen, t in front, budget) for t in self.trials)
        self._sensitivities(report)
        deployment = self._prove(report, program, recipe)
        self._test(report, program, recipe)
        self._notes(report, chosen)
        return Result(
            model=copy.deepcopy(bench.edited(recipe)), recipe=recipe, report=report, chosen=chosen, trials=self.trials,
            pareto=front, violations=budget.check(chosen.cost, chosen.drop), program=program, deployment=deployment,
            interrupted=self.interrupted,
        )  # fmt: skip

    def _rows(self, report: Report, recipe: Recipe, chosen: Trial) -> None:
        """The start, one row a step (counted), and the deployed program (measured)."""
        bench, task = self.bench, self.bench.task
        start = next((t for t in self.trials if t.point == Point()), None)
        cost = count(capture(bench.model, task.example))
        report.add("start", cost if start is None else start.cost, bench.reference, note="float32")
        for i, step in enumerate(recipe.steps, 1):
            model = bench.edited(Recipe(recipe.steps[:i]))
            knobs = knobs_of(step)
            report.add(technique_name(step), count(graph_of(model, task)), task.score(model), knobs=knobs,
                       note="simulated until deploy")  # fmt: skip
        report.add("deploy", chosen.cost, chosen.score, chosen.seconds)

    def _sensitivities(self, report: Report) -> None:
        rows = [(s.axis, str(s.value), s.drop) for s in self.table]
        if rows:
            title = "Sensitivity: loss of score of each move alone, without training"
            report.tables.append(Table(title, ("axis", "value", "drop"), rows))

    def _prove(self, report: Report, program: Program, recipe: Recipe) -> Deployment | None:
        """Deploy the chosen program with real samples and compare torch, program, C and target byte by byte."""
        bench = self.bench
        x = bench.task.validation.x[:PROVEN_ON_HOST].numpy()
        if self.folder is None:
            deployment = deploy.rehearse(program, self.target, x, PROVEN_ON_TARGET)
        else:
            deployment = deploy.deploy(program, self.folder, self.target, x, PROVEN_ON_TARGET)
            report.files["C project"] = self.folder.name
        samples, mismatches = dict(deployment.parity.samples), dict(deployment.parity.mismatches)
        if program.buffers[program.output].dtype != "float32":  # float sums in torch run in another order
            samples["torch"], mismatches["torch"] = len(x), self._torch_mismatches(program, recipe, x)
        report.parity = Parity(samples, mismatches)
        report.memory = deployment.memory
        report.layers = list(deployment.layers(self._fidelity(program, recipe, x)))
        return deployment if self.folder else None

    def _torch_mismatches(self, program: Program, recipe: Recipe, x: Array) -> int:
        with torch.no_grad():
            mine = self.bench.edited(recipe)(torch.from_numpy(x)).numpy()
        theirs = predict(program, x)
        return int((mine != theirs).reshape(len(mine), -1).any(axis=1).sum())

    def _fidelity(self, program: Program, recipe: Recipe, x: Array) -> Mapping[str, tuple[float | None, float]]:
        """Integers against the float model that was quantised (with training in between, the gap contains that)."""
        before = Recipe(tuple(s for s in recipe if not isinstance(s, Quantize)))
        floats = lower(capture(self.bench.edited(before), self.bench.task.example), "float")
        return layer_fidelity(program, floats, x[:64])

    def _test(self, report: Report, program: Program, recipe: Recipe) -> None:
        """Touch the test split: once, for the model as it was and for the deployed program."""
        bench = self.bench
        if self.interrupted:
            report.notes.append("scores are those of validation: the test split is untouched until the search ends")
            return
        if bench.task.test is None:
            report.notes.append(
                "there is no test split: scores are those of the validation split that chose the recipe"
            )
            return
        outputs = bench.outputs(program, recipe, "test")
        report.test_scores = (
            bench.task.score(bench.model, "test"),
            bench.task.score_outputs(outputs, "test"),
        )

    def _notes(self, report: Report, chosen: Trial) -> None:
        report.interrupted = self.interrupted
        if self.lesson is not None:
            self.lesson.tell(report)
        report.notes.extend(self.notes)
        if broken := self.budget.check(chosen.cost, chosen.drop):
            listed = "; ".join(str(v) for v in broken)
            tried = len(self.trials)
            report.notes.append(
                f"none of {tried} recipes keeps the budget on validation; the nearest is shown: {listed}"
            )
        if resumed := self.bench.state.resumed:
            report.notes.append(f"{resumed} results were read from the state of an earlier run")


def choose(trials: Sequence[Trial], budget: Budget) -> Trial:
    """Return the cheapest trial that keeps the budget, or the nearest to it.

    Raises ThriftyError with every reason when none could be built.
    """
    best = cheapest(trials, Goal(budget), budget.max_drop)
    if best is None or budget.check(best.cost, best.drop):
        best = nearest(trials, budget)
    if best is None:
        errors = "\n".join(f"  - {name_of(t.point)}: {t.error}" for t in trials)
        raise ThriftyError(f"none of the {len(trials)} recipes could be built:\n{errors}")
    return best


def _candidate(trial: Trial, chosen: bool, front: bool, budget: Budget) -> Candidate:
    feasible = trial.score is not None and not budget.check(trial.cost, trial.drop)
    return Candidate(
        name=name_of(trial.point), recipe=trial.recipe, cost=trial.cost, score=trial.score, feasible=feasible,
        pareto=front, chosen=chosen, seconds=trial.seconds, error=trial.error,
    )  # fmt: skip


def _metric_name(task: Task) -> str:
    return getattr(task.metric, "__name__", "accuracy" if task.classes else "score")
