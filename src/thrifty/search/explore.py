"""Which recipes are tried, and in what order: a fixed sequence that the tolerated drop can only cut short.

Two stages, after the outline that Deeplite Neutrino (Sankaran et al. 2021) gives of itself: sensitivities
and a bisection on their tolerance find a coarse recipe ("exploration"); greedy moves by gain in cost per
loss of score refine it ("annealing"). Both run without training first; the same again with training, when
that is not enough.

Larger tolerance never gives a worse result, by construction. The sequence climbs a fixed ladder of
tolerances, and what is tried on one rung depends only on what was tried on the rungs below; the caller's
own tolerance decides where the climb ends, and which of all trials is taken. So the trials for a small
tolerance are a subset of those for a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from thrifty.cost import Cost
from thrifty.search.space import EPSILON, Goal, Point, Probe, Space, Trial, Value, cheapest

TRAIN = "train"  # the axis whose value True lets a recipe train
STEPS = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
DECADES = 6  # above 0.75 the ladder goes on as 1, 2, 5, 10, 20, 50, ...


class Exhausted(Exception):
    """No trials are left."""


def ladder(max_drop: float | None) -> Iterator[float]:
    """Yield the fixed tolerances up to `max_drop`, rising from 0.

    >>> list(ladder(0.006))
    [0.0, 0.0025, 0.005]
    """
    big = (m * 10.0**e for e in range(DECADES) for m in (1, 2, 5))
    for step in (*STEPS, *big):
        if max_drop is not None and step > max_drop + EPSILON:
            return
        yield step


@dataclass
class Ledger:
    """The trials of one phase, in order, with the rung on which each was first asked for."""

    measure: Callable[[Point], Trial]
    trials: int  # how many distinct points may be asked for
    known: Mapping[Point, tuple[Trial, float]] = field(default_factory=dict)  # of an earlier phase
    asked: dict[Point, tuple[Trial, float]] = field(default_factory=dict)

    def ask(self, point: Point, rung: float) -> Trial:
        """Return the trial of a point; raises Exhausted when it is new and none are left."""
        if point in self.asked:
            return self.asked[point][0]
        if point in self.known and self.known[point][1] <= rung:
            return self.known[point][0]
        if len(self.asked) >= self.trials:
            raise Exhausted
        trial = self.measure(point)
        self.asked[point] = (trial, rung)
        return trial

    def visible(self, rung: float) -> list[Trial]:
        """Return what any search that climbs to this rung knows when it gets there."""
        known = [t for t, r in self.known.values() if r <= rung]
        return known + [t for t, r in self.asked.values() if r <= rung]


@dataclass(frozen=True)
class Sensitivity:
    """What one move costs in score when made alone, untrained, and what it saves."""

    axis: str
    value: Value
    drop: float
    saving: Cost  # counted: start minus moved


def sensitivities(space: Space, probe: Callable[[Point], Probe]) -> list[Sensitivity]:
    """Return one entry per axis value that works: the drop and the saving against the space's start, alone."""
    start = probe(space.start)
    found = []
    for axis, values in space.axes.items():
        for value in values:
            moved = probe(space.start.moved(axis, value))
            if moved.drop is not None and start.drop is not None:
                saving = _minus(start.cost, moved.cost)
                found.append(Sensitivity(axis, value, max(0.0, moved.drop - start.drop), saving))
    return found


def _minus(a: Cost, b: Cost) -> Cost:
    def gap(name: str) -> int | None:
        x, y = getattr(a, name), getattr(b, name)
        return None if x is None or y is None else x - y

    return Cost(
        params=gap("params"), weight_bytes=gap("weight_bytes"), macs=gap("macs"),
        activation_bytes=gap("activation_bytes"),
    )  # fmt: skip


def assignments(table: Sequence[Sensitivity], space: Space) -> list[tuple[tuple[str, Value], ...]]:
    """Return, for every tolerance that matters, rising, the harshest value of each axis that loses at most it alone."""
    result: list[tuple[tuple[str, Value], ...]] = []
    for tolerance in sorted({s.drop for s in table}):
        chosen: dict[str, Value] = {}
        for axis, values in space.axes.items():
            fine = [s.value for s in table if s.axis == axis and s.drop <= tolerance + EPSILON]
            if fine:
                chosen[axis] = max(fine, key=values.index)
        entry = tuple(sorted(chosen.items()))
        if entry and (not result or entry != result[-1]):
            result.append(entry)
    return result


@dataclass
class Explorer:
    """One climb up the ladder. `run` may end at any time with an exception: what was measured is in the ledgers."""

    space: Space
    goal: Goal
    measure: Callable[[Point], Trial]
    probe: Callable[[Point], Probe]
    max_drop: float | None
    level: int = 1  # 1: bisection only; 2: greedy moves as well
    trials: int = 32
    train: bool = True  # whether recipes that train may be tried
    table: list[Sensitivity] = field(default_factory=list)
    untrained: Ledger = field(init=False)
    trained: Ledger = field(init=False)

    def __post_init__(self) -> None:
        # A fixed share each: how many trials one phase leaves over depends on the tolerance and must not count.
        half = max(len(self.space.bases), (self.trials + 1) // 2)
        self.untrained = Ledger(self.measure, half if self.train else self.trials)
        self.trained = Ledger(self.measure, max(0, self.trials - half), self.untrained.asked)

    def run(self) -> None:
        """Try recipes without training, then, if that does not do it, with training."""
        for base in self.space.bases[: self.trials]:
            self.untrained.ask(base, 0.0)
        if self.trials > len(self.space.bases):
            self.table = sensitivities(self.space, self.probe)
            self._climb(self.untrained, train=False)
        if self.train and not self.satisfied(self.untrained):
            self._climb(self.trained, train=True)

    def satisfied(self, ledger: Ledger) -> bool:
        """Whether there are limits and a trial keeps them all: then nothing more is needed."""
        best = cheapest(ledger.visible(float("inf")), self.goal, self.max_drop)
        return bool(self.goal.limits) and best is not None and self.goal.excess(best.cost) == 0

    def _climb(self, ledger: Ledger, train: bool) -> None:
        low = -1
        try:
            for rung in ladder(self.max_drop):
                low = self._bisect(ledger, rung, low, train)
                if self.level > 1:
                    self._anneal(ledger, rung, train)
                if self.max_drop is None and (self.satisfied(ledger) or not self._harsher(ledger, rung)):
                    return
        except Exhausted:
            return

    def _harsher(self, ledger: Ledger, rung: float) -> bool:
        """Whether some trial lost more than this rung allows: else a higher rung changes nothing."""
        return any(t.drop is not None and t.drop > rung + EPSILON for t in ledger.visible(rung))

    def _base(self, ledger: Ledger, rung: float, train: bool) -> Point | None:
        """Return the favourite integer base if it is good enough, trained if it must be; else the cheapest that is."""
        start = self.space.start
        if ledger.ask(start, rung).within(rung):
            return start.moved(TRAIN, train)
        if train and ledger.ask(start.moved(TRAIN, True), rung).within(rung):
            return start.moved(TRAIN, True)
        bases = [ledger.ask(b, rung) for b in self.space.bases]
        best = cheapest(bases, self.goal, rung)
        return None if best is None else best.point.moved(TRAIN, train)

    def _bisect(self, ledger: Ledger, rung: float, low: int, train: bool) -> int:
        """Stage 1: find the harshest assignment that stays on the rung; return its index, -1 if none does."""
        base = self._base(ledger, rung, train)
        if base is None:
            return low
        choices = assignments(self.table, self.space)
        high = len(choices)
        start = self.space.start
        fixed = {a for a in self.space.axes if start.get(a) is not None and start.get(a) != base.get(a)}
        while high - low > 1:
            middle = (low + high) // 2
            choice = [(axis, value) for axis, value in choices[middle] if axis not in fixed]
            if ledger.ask(self.space.over(base, choice), rung).within(rung):
                low = middle
            else:
                high = middle
        return low

    def _anneal(self, ledger: Ledger, rung: float, train: bool) -> None:
        """Stage 2: from the cheapest trial on the rung, make the most rewarding moves; freeze those that fail."""
        state = cheapest(ledger.visible(rung), self.goal, rung)
        frozen: set[str] = set()
        while state is not None:
            moves = [a for a in self.space.moves(state.point) if a not in frozen]
            if not moves:
                return
            axis = max(moves, key=lambda a, now=state: self._reward(now, a))  # type: ignore[misc]
            moved = state.point.moved(axis, self.space.next_value(state.point, axis)).moved(TRAIN, train)
            trial = ledger.ask(moved, rung)
            if trial.within(rung) and self.goal.key(trial.cost) < self.goal.key(state.cost):
                state = trial
            else:
                frozen.add(axis)

    def _reward(self, state: Trial, axis: str) -> float:
        """Predicted fall of the cost over the predicted loss of score of the next move along an axis."""
        value = self.space.next_value(state.point, axis)
        entry = self._entry(axis, value)
        if entry is None:
            return 0.0
        before = self._entry(axis, state.point.get(axis))
        predicted = self._predict(state.cost, entry, before)
        gain = self.goal.scalar(state.cost, state.cost) - self.goal.scalar(predicted, state.cost)
        return gain / max(entry.drop - (before.drop if before else 0.0), 1e-4)

    def _entry(self, axis: str, value: Value | None) -> Sensitivity | None:
        return next((s for s in self.table if (s.axis, s.value) == (axis, value)), None)

    def _predict(self, cost: Cost, entry: Sensitivity, before: Sensitivity | None) -> Cost:
        """Counted savings turned into measured ones: a weight byte is a flash byte; instructions follow MACs."""
        saved = entry.saving if before is None else _minus(entry.saving, before.saving)
        share = (saved.macs or 0) / cost.macs if cost.macs else 0.0

        def less(now: int | None, by: float) -> int | None:
            return None if now is None else max(0, int(now - by))

        return Cost(
            params=less(cost.params, saved.params or 0),
            weight_bytes=less(cost.weight_bytes, saved.weight_bytes or 0),
            macs=less(cost.macs, saved.macs or 0),
            activation_bytes=less(cost.activation_bytes, saved.activation_bytes or 0),
            flash_bytes=less(cost.flash_bytes, saved.weight_bytes or 0),
            ram_bytes=less(cost.ram_bytes, saved.activation_bytes or 0),
            instructions=less(cost.instructions, share * (cost.instructions or 0)),
        )
