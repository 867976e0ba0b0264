"""Optuna as another source of points: its TPE sampler, on score and cost at once, so that no tolerance steers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from thrifty.errors import need
from thrifty.search.explore import TRAIN, Ledger, Sensitivity
from thrifty.search.space import Goal, Point, Space, Trial, cheapest

AS_IS = "as it is"
WORST = 1e9


@dataclass
class Sampler:
    """Asks optuna for points: half of the trials without training, then, if those do not do it, half with.

    What is asked for depends on the seed and on earlier results only, never on the tolerated drop.
    """

    space: Space
    goal: Goal
    measure: Callable[[Point], Trial]
    max_drop: float | None
    seed: int = 0
    trials: int = 32
    train: bool = True
    table: list[Sensitivity] = field(default_factory=list)  # none: this sampler does not probe

    @staticmethod
    def need() -> Any:
        """Import optuna, or raise MissingExtra."""
        return need("optuna", extra="search")

    def run(self) -> None:
        """Try the bases, then what optuna proposes."""
        half = max(len(self.space.bases), (self.trials + 1) // 2) if self.train else self.trials
        asked = self._sample(Ledger(self.measure, half), train=False)
        best = cheapest([t for t, _ in asked.asked.values()], self.goal, self.max_drop)
        met = bool(self.goal.limits) and best is not None and self.goal.excess(best.cost) == 0
        if self.train and not met:
            self._sample(Ledger(self.measure, self.trials - half, asked.asked), train=True)

    def _sample(self, ledger: Ledger, train: bool) -> Ledger:
        optuna = self.need()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            directions=["minimize"] * 2, sampler=optuna.samplers.TPESampler(seed=self.seed + train)
        )
        first = self.space.bases[: ledger.trials] if not train else ()
        reference = None
        for base in first:
            trial = ledger.ask(base, 0.0)
            reference = reference or (trial.cost if trial.score is not None else None)
            study.add_trial(self._frozen(optuna, base, trial, reference))
        for _ in range(4 * ledger.trials):  # repeated points are free, but not for ever
            if len(ledger.asked) >= ledger.trials:
                break
            ask = study.ask()
            point = self._point({a: ask.suggest_categorical(a, [AS_IS, *v]) for a, v in self.space.axes.items()}, train)
            trial = ledger.ask(point, 0.0)
            reference = reference or (trial.cost if trial.score is not None else None)
            study.tell(ask, self._values(trial, reference))
        return ledger

    def _point(self, values: dict[str, Any], train: bool) -> Point:
        point = self.space.bases[0] if len(self.space.bases) == 1 else self._exact()
        for axis, value in values.items():
            if value != AS_IS and axis not in self.space.needs:
                point = point.moved(axis, value)
        for axis in self.space.needs:
            if values[axis] != AS_IS and self.space.means(point, axis):
                point = point.moved(axis, values[axis])
        return point.moved(TRAIN, train)

    def _exact(self) -> Point:
        """The start without what lies on an axis: what is always worth doing."""
        point = self.space.start
        for axis in self.space.axes:
            point = point.moved(axis, None)
        return point

    def _values(self, trial: Trial, reference: Any) -> tuple[float, float]:
        if trial.drop is None or reference is None:
            return WORST, WORST
        return trial.drop, min(WORST, self.goal.scalar(trial.cost, reference))

    def _frozen(self, optuna: Any, base: Point, trial: Trial, reference: Any) -> Any:
        params = {axis: base.get(axis, AS_IS) for axis in self.space.axes}
        choices = {
            axis: optuna.distributions.CategoricalDistribution([AS_IS, *values])
            for axis, values in self.space.axes.items()
        }
        return optuna.trial.create_trial(
            params=params, distributions=choices, values=list(self._values(trial, reference))
        )
