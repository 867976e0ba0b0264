"""What the search moves in, as plain data: points, the axes they move along, trials, and what "better" means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from thrifty.budget import Budget
from thrifty.cost import Cost

Value = str | int | float | bool
EPSILON = 1e-9  # scores this close are equal: they are ratios of counts, summed in floating point


@dataclass(frozen=True)
class Point:
    """A recipe before it is written out: the settings that differ from leaving the model as it is.

    >>> Point().moved("precision", "int8").moved("prune:features.0", 0.5).key
    '{"precision":"int8","prune:features.0":0.5}'
    """

    settings: tuple[tuple[str, Value], ...] = ()  # (axis, value), sorted by axis

    def get(self, axis: str, default: Value | None = None) -> Value | None:
        """Return the value on an axis, or `default` where the model is left as it is."""
        return dict(self.settings).get(axis, default)

    def moved(self, axis: str, value: Value | None) -> Point:
        """Return the point with another value on one axis; None and False remove the setting."""
        settings = {k: v for k, v in self.settings if k != axis}
        if value is not None and value is not False:
            settings[axis] = value
        return Point(tuple(sorted(settings.items())))

    @property
    def key(self) -> str:
        """The settings as canonical JSON: equal points have equal keys."""
        return json.dumps(dict(self.settings), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_key(key: str) -> Point:
        """Read `key` back."""
        return Point(tuple(sorted(json.loads(key).items())))


@dataclass(frozen=True)
class Trial:
    """A point that was built and measured; `score` is None when it could not be, and `error` says why."""

    point: Point
    recipe: str  # TOML
    cost: Cost
    score: float | None  # of the deployed program, on validation
    drop: float | None  # reference score - score
    seconds: float = 0.0
    error: str = ""

    def within(self, max_drop: float | None) -> bool:
        """Whether it works and loses at most `max_drop` (None = any loss)."""
        if self.drop is None:
            return False
        return max_drop is None or self.drop <= max_drop + EPSILON

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {**asdict(self), "point": self.point.key, "cost": self.cost.to_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Trial:
        """Read `to_dict` back."""
        known = {f.name: data[f.name] for f in fields(Trial) if f.name in data}
        return Trial(**{**known, "point": Point.from_key(data["point"]), "cost": Cost(**data["cost"])})


@dataclass(frozen=True)
class Probe:
    """A point that was only edited and counted, and scored on a part of validation, without training."""

    point: Point
    cost: Cost  # counted numbers only
    drop: float | None  # against the reference on the same part; None when the edit is impossible or changes nothing
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"point": self.point.key, "cost": self.cost.to_dict(), "drop": self.drop, "error": self.error}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Probe:
        """Read `to_dict` back."""
        return Probe(Point.from_key(data["point"]), Cost(**data["cost"]), data["drop"], data["error"])


@dataclass(frozen=True)
class Space:
    """Where to look. Each axis lists its values from the mildest to the harshest, without "as it is"."""

    bases: tuple[Point, ...]  # tried first, in this order; the first is the untouched model
    start: Point  # what sensitivities are taken from: the favourite integer base
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    needs: Mapping[str, tuple[str, tuple[Value, ...]]] = field(default_factory=dict)
    # axis -> (other axis, its values) without which a setting on the axis means nothing

    def means(self, point: Point, axis: str) -> bool:
        """Whether a setting on an axis means something at a point."""
        if axis not in self.needs:
            return True
        other, values = self.needs[axis]
        return point.get(other) in values

    def moves(self, point: Point) -> list[str]:
        """Return the axes along which the point can go one notch further."""
        return [a for a in self.axes if self.means(point, a) and self.next_value(point, a) is not None]

    def over(self, base: Point, choice: Iterable[tuple[str, Value]]) -> Point:
        """Return the base with a choice on top, but for values that mean nothing there or are milder."""
        for axis, value in choice:
            values, now = self.axes[axis], base.get(axis)
            milder = now in values and values.index(value) <= values.index(now)
            if self.means(base, axis) and not milder:
                base = base.moved(axis, value)
        return base

    def next_value(self, point: Point, axis: str) -> Value | None:
        """Return the value one notch harsher than the point's on an axis, or None at the end."""
        values = self.axes[axis]
        now = point.get(axis)
        place = values.index(now) + 1 if now in values else 0
        return values[place] if place < len(values) else None


LIMITED = ("flash_bytes", "ram_bytes", "instructions", "macs", "params")


@dataclass(frozen=True)
class Goal:
    """What is being minimised, apart from the score: it never depends on the tolerated drop.

    With limits in the budget: first how far they are exceeded, then the sum of use / limit.
    Without: flash bytes, then instructions (where nothing is measured, as on the host: weight bytes, then MACs).
    """

    budget: Budget

    @property
    def limits(self) -> tuple[str, ...]:
        """Names of the cost fields that the budget limits."""
        return tuple(n for n in LIMITED if getattr(self.budget, n) is not None)

    def excess(self, cost: Cost) -> float:
        """Return how far the limits are exceeded: the sum over limits of over / allowed; 0 = none is."""
        return self.budget.excess(cost, None)

    def key(self, cost: Cost) -> tuple[float, float]:
        """Return what to sort by; smaller is better. An unknown number is the worst."""
        if not self.limits:
            flash = cost.weight_bytes if cost.flash_bytes is None else cost.flash_bytes
            instructions = cost.macs if cost.instructions is None else cost.instructions
            return _known(flash), _known(instructions)
        use = sum(_known(getattr(cost, n)) / getattr(self.budget, n) for n in self.limits)
        return self.excess(cost), use

    def scalar(self, cost: Cost, reference: Cost) -> float:
        """Return one number that falls as `key` falls, to weigh a gain in cost against a loss of score."""
        if self.limits:
            excess, use = self.key(cost)
            return 10 * excess + use
        flash, instructions = self.key(cost)
        flash0, instructions0 = self.key(reference)
        return flash / flash0 + (0.1 * instructions / instructions0 if instructions0 < float("inf") else 0.0)


def _known(number: float | None) -> float:
    return float("inf") if number is None else float(number)


def cheapest(trials: Iterable[Trial], goal: Goal, max_drop: float | None) -> Trial | None:
    """Return the best trial that loses at most `max_drop`; None when there is none.

    With max_drop None and limits, the score is the goal: among those within every limit, the highest score,
    then the cheapest.
    """
    fine = [t for t in trials if t.within(max_drop)]
    if not fine:
        return None
    if max_drop is None:
        return min(fine, key=lambda t: (goal.excess(t.cost), t.drop, goal.key(t.cost)))
    return min(fine, key=lambda t: (*goal.key(t.cost), t.drop))


def nearest(trials: Sequence[Trial], budget: Budget) -> Trial | None:
    """Return the trial that violates the budget least: the smallest sum over limits of over / allowed."""
    scored = [t for t in trials if t.drop is not None]
    return min(scored, key=lambda t: (budget.excess(t.cost, t.drop), t.drop), default=None)


def pareto(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials that no other beats in score, flash, RAM and instructions at once, in order.

    >>> a = Trial(Point(), "", Cost(flash_bytes=9), 0.9, 0.0)
    >>> b = Trial(Point(), "", Cost(flash_bytes=5), 0.9, 0.0)
    >>> pareto([a, b]) == (b,)
    True
    """
    scored = [t for t in trials if t.score is not None]
    vectors = [_vector(t) for t in scored]
    kept = []
    for i, mine in enumerate(vectors):
        beaten = any(
            all(x <= y for x, y in zip(other, mine)) and (other != mine or j < i)
            for j, other in enumerate(vectors)
            if j != i
        )
        if not beaten:
            kept.append(scored[i])
    return tuple(kept)


def _vector(trial: Trial) -> tuple[float, float, float, float]:
    cost = trial.cost
    return (
        -(trial.score or 0.0),
        _known(cost.flash_bytes),
        _known(cost.ram_bytes),
        _known(cost.instructions),
    )
