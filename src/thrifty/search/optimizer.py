"""`optimize`: a model, data and a budget in; the cheapest recipe that keeps the score out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import thrifty
from thrifty import deploy
from thrifty.budget import Budget
from thrifty.capture import capture
from thrifty.compress.lossless import Lossless
from thrifty.deploy.lower import check
from thrifty.deploy.targets import Target
from thrifty.deploy.targets import target as find_target
from thrifty.errors import (
    DataError,
    KnobError,
    NoMatch,
    NothingToDo,
    UnsupportedModel,
    close_to,
)
from thrifty.objectives.teaching import FLOAT_MODEL, Teaching
from thrifty.search.bench import Bench
from thrifty.search.ending import Ending, Result
from thrifty.search.explore import Explorer, Sensitivity
from thrifty.search.recipes import name_of, space_of
from thrifty.search.sample import Sampler
from thrifty.search.space import Goal, Point, Space, Trial
from thrifty.search.state import State
from thrifty.task import Task
from thrifty.training import digest_of, parts_of

SAMPLERS = ("greedy", "optuna")
Progress = Callable[[int, int, str], None]


def optimize(
    model: nn.Module,
    task: Task,
    budget: Budget,
    target: str = "cortex-m4",
    *,
    seed: int | None = None,
    trials: int = 32,
    time_limit: float | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
    sampler: str = "greedy",
    level: int = 1,
    epochs: int = 2,
    train: bool = True,
    keep: Sequence[str] = (),
    folder: str | Path | None = None,
    teaching: Teaching | None = FLOAT_MODEL,
) -> Result:
    """Find the cheapest recipe for a trained model that keeps its score, deployed on a target.

    Score and cost of a trial are those of the deployed program: its C on the whole validation split, its
    image built for the target and run in the emulator. Recipes without training come first; recipes that
    train are tried when those do not meet the limits, or when there are no limits but `max_drop`. Source of
    the two stages: Deeplite Neutrino (Sankaran et al. 2021, arXiv:2101.04073), as far as it is public; see
    search/explore.py.

    What is minimised: with limits in the budget, first what exceeds them, then the sum of use / limit;
    without, flash, then instructions. Without `max_drop`: the loss of score, among all that keep the
    limits. With `max_drop` 0, a trial counts only if its validation score is at least the reference's; the
    untouched model as a float32 program is always tried, so that it is the result when nothing smaller
    keeps the score. At equal seed and trials, a larger `max_drop` never gives a larger model (with limits:
    never turns a budget that is met into one that is not), unless `time_limit` cuts the search.

    task: its validation split chooses; its test split is scored once, at the end, for the model and for the result.
    target: a core or a board; a board's own memory limits the budget too.
    seed: of everything random, the task's when None; trials: how many recipes are built and measured at most.
    time_limit: seconds after which no new trial starts. state: a folder in which results are kept, so that
    a killed search goes on; the same search must be asked for again. progress: called with (trials so far,
    trials at most, text). sampler: "greedy" (sensitivities, bisection, moves) or "optuna" (its TPE sampler;
    extra "search"). level: 1 = bisection; 2 = greedy moves too, longer and smaller. epochs: of each
    training. train=False: never trains. keep: patterns of modules that are left at full width. folder:
    where the C project is written (None = nowhere). teaching: who teaches the recovery, by default the given model;
    None = nobody. The chosen recipe, if it was taught, is also carried out without the teacher: the report says what
    the teacher bought, and what scores higher on validation is the result (`compare=False` spares that).

    Ctrl-C ends the search with what is known, `interrupted` set and the test split untouched, so that it is
    scored once when a resumed search ends; it is passed on when no trial was finished.
    Raises, before any work: KnobError, NoMatch, DataError (NaN in the weights, a metric that gives NaN,
    shapes that do not fit), CaptureError, UnsupportedModel with everything that cannot be deployed,
    MissingExtra without a compiler or emulator; StoreError when `state` holds another search or cannot be
    written.
    """
    chosen_target = find_target(target)
    task = replace(task, seed=task.seed if seed is None else seed)
    options = _Options(budget, chosen_target, trials, level, sampler, epochs, train, tuple(keep), time_limit)
    _refuse(model, task, options)
    model = copy.deepcopy(model).eval()
    space = space_of(capture(model, task.example), keep, lossless=_has_lossless(model, task))
    taught = teaching.task(task, model) if teaching is not None and train else None
    kept = State.open(state, _request(model, taught or task, options))
    bench = Bench(model, task, chosen_target.name, kept, epochs=epochs, teaching=teaching, taught=taught)
    bench.reference = _fact(kept, "reference", lambda: task.score(model))
    search = _Search(bench, space, options, progress)
    interrupted = search.run()
    ending = Ending(
        bench=bench, trials=tuple(search.asked.values()), budget=options.goal_budget, target=chosen_target.name,
        table=search.table, notes=search.notes(interrupted), interrupted=interrupted,
        folder=None if folder is None else Path(folder),
    )  # fmt: skip
    return ending.compared(None if search.out_of_time else search.announce).result()


@dataclass(frozen=True)
class _Options:
    budget: Budget
    target: Target
    trials: int
    level: int
    sampler: str
    epochs: int
    train: bool
    keep: tuple[str, ...]
    time_limit: float | None

    def problems(self) -> list[str]:
        """Return one clause for each option outside its range."""
        found = []
        if all(getattr(self.budget, f.name) is None for f in fields(Budget)):
            found.append("the budget is empty: give max_drop, or a limit such as flash_bytes")
        unmeasured = [n for n in ("flash_bytes", "instructions") if getattr(self.budget, n) is not None]
        if self.target.core == "host" and unmeasured:
            found.append(f"{' and '.join(unmeasured)} cannot be limited for the host; choose a Cortex-M target")
        if self.trials < 1:
            found.append(f"trials is {self.trials}; it must be at least 1")
        if self.level not in (1, 2):
            found.append(f"level is {self.level}; it must be 1 or 2")
        if self.epochs < 1:
            found.append(f"epochs is {self.epochs}; it must be at least 1 (train=False: no training)")
        if self.time_limit is not None and not self.time_limit > 0:
            found.append(f"time_limit is {self.time_limit}; it must be positive, or None")
        return found

    @property
    def goal_budget(self) -> Budget:
        """The budget, with the memory of the board as a limit."""

        def least(limit: int | None, board: int | None) -> int | None:
            both = [v for v in (limit, board) if v is not None]
            return min(both) if both else None

        b, t = self.budget, self.target
        return replace(b, flash_bytes=least(b.flash_bytes, t.flash_bytes), ram_bytes=least(b.ram_bytes, t.ram_bytes))


def _refuse(model: nn.Module, task: Task, options: _Options) -> None:
    """Raise everything that can be known before any work."""
    if options.sampler not in SAMPLERS:
        raise NoMatch(f"there is no sampler '{options.sampler}'; {close_to(options.sampler, SAMPLERS)}")
    if problems := options.problems():
        raise KnobError("optimize: " + "; ".join(problems))
    if options.sampler == "optuna":
        Sampler.need()
    deploy.refuse_missing_tools(options.target)
    bad = [name for name, value in model.state_dict().items() if isinstance(value, Tensor) and not _finite(value)]
    if bad:
        raise DataError(f"the model has NaN or infinity in: {', '.join(bad[:8])}{' ...' if len(bad) > 8 else ''}")
    graph = capture(model, task.example)
    if refusals := check(graph):
        raise UnsupportedModel(refusals)
    space_of(graph, options.keep)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _has_lossless(model: nn.Module, task: Task) -> bool:
    """Whether anything can be removed exactly."""
    try:
        Lossless().edit(model, task)
    except NothingToDo:
        return False
    return True


def _request(model: nn.Module, task: Task, options: _Options) -> dict[str, str]:
    """Return what a resumed search must have in common with the first one."""
    values = [f"{f.name}={v}" for f in fields(Budget) if (v := getattr(options.budget, f.name)) is not None]
    return {
        "thrifty": thrifty.__version__,
        "model": digest_of([str(model), *model.state_dict().items()]),
        "data": digest_of([(n, getattr(s, a)) for n in ("train", "validation") if (s := task.split(n)) for a in "xy"]),
        "metric": getattr(task.metric, "__qualname__", "default"),
        "objective": digest_of(parts_of(task.objective)),
        "seed": str(task.seed),
        "budget": ", ".join(values),
        "target": options.target.name,
        "sampler": options.sampler,
        "level": str(options.level),
        "epochs": str(options.epochs),
        "train": str(options.train),
        "keep": ", ".join(options.keep) or "nothing",
    }


def _fact(state: State, name: str, compute: Callable[[], float]) -> float:
    if name not in state.facts:
        state.add_fact(name, compute())
    return float(state.facts[name])


class _OutOfTime(Exception):
    pass


@dataclass
class _Search:
    """The trials of one call, in order."""

    bench: Bench
    space: Space
    options: _Options
    progress: Progress | None
    asked: dict[Point, Trial] = field(default_factory=dict)
    table: list[Sensitivity] = field(default_factory=list)
    out_of_time: bool = False

    def run(self) -> bool:
        """Explore; return whether Ctrl-C ended it."""
        self.started = time.monotonic()
        o, goal = self.options, Goal(self.options.goal_budget)
        parts = {
            "goal": goal,
            "measure": self._measure,
            "max_drop": o.budget.max_drop,
            "trials": o.trials,
            "train": o.train,
        }
        explorer: Explorer | Sampler
        if o.sampler == "optuna":
            explorer = Sampler(self.space, seed=self.bench.task.seed, **parts)  # type: ignore[arg-type]
        else:
            explorer = Explorer(self.space, probe=self._probe, level=o.level, **parts)  # type: ignore[arg-type]
        try:
            explorer.run()
        except _OutOfTime:
            self.out_of_time = True
        except KeyboardInterrupt:
            if not any(t.score is not None for t in self.asked.values()):
                raise
            return True
        finally:
            self.table = explorer.table
        return False

    def _measure(self, point: Point) -> Trial:
        self._watch(name_of(point))
        trial = self.bench.measure(point)
        self.asked[point] = trial
        return trial

    def _probe(self, point: Point) -> object:
        self._watch(f"sensitivity: {name_of(point)}")
        return self.bench.probe(point)

    def _watch(self, text: str) -> None:
        limit = self.options.time_limit
        if limit is not None and time.monotonic() - self.started > limit and self.asked:
            raise _OutOfTime
        self.announce(text)

    def announce(self, text: str) -> None:
        """Say what goes on after the last trial."""
        if self.progress:
            self.progress(len(self.asked), self.options.trials, text)

    def notes(self, interrupted: bool) -> list[str]:
        """Return what ended the search early, in sentences."""
        tried, found = len(self.asked), []
        if interrupted:
            found.append(f"the search was interrupted after {tried} of at most {self.options.trials} trials")
        if self.out_of_time:
            found.append(f"the time limit of {self.options.time_limit:g} s ended the search after {tried} trials")
        return found
