"""The order of trials, on made-up landscapes: monotone in the tolerance, anytime, honest about what fits."""

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.budget import Budget
from thrifty.cost import Cost
from thrifty.search.explore import Explorer, assignments, ladder, sensitivities
from thrifty.search.space import Goal, Point, Probe, Space, Trial, cheapest, nearest, pareto

FLOAT, INT16, INT8 = Point(), Point().moved("precision", "int16"), Point().moved("precision", "int8")


def noise(key: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}{key}".encode()).digest()[:4], "big") / 2**32


class World:
    """A landscape: every axis has its own price in score; training gives most of it back; noise on top."""

    def __init__(self, seed: int, layers: int = 4, jitter: float = 0.004) -> None:
        self.seed, self.jitter, self.measured = seed, jitter, []
        self.space = Space(
            bases=(FLOAT, INT16, INT8, Point().moved("precision", "int8-shift")),
            start=INT8,
            axes={
                "precision": ("int16", "int8", "int8-shift"),
                **{f"prune:{i}": (0.25, 0.5, 0.75) for i in range(layers)},
                **{f"bits:{i}": (4,) for i in range(layers)},
            },
            needs={f"bits:{i}": ("precision", ("int8", "int8-shift")) for i in range(layers)},
        )

    def drop(self, point: Point) -> float:
        total = {None: 0.0, "int16": 0.0002, "int8": 0.004, "int8-shift": 0.008}[point.get("precision")]
        for axis, value in point.settings:
            price = noise(axis, self.seed)
            if axis.startswith("prune:"):
                total += 0.06 * price * float(value) ** 2
            elif axis.startswith("bits:"):
                total += 0.02 * price
        if point.get("train"):
            total *= 0.3
        return round(total + self.jitter * (noise(point.key, self.seed) - 0.5), 4)

    def cost(self, point: Point) -> Cost:
        width = {None: 32, "int16": 16, "int8": 8, "int8-shift": 8}[point.get("precision")]
        size, macs = 500, 100
        for i in range(sum(a.startswith("prune:") for a in self.space.axes)):
            kept = 1 - float(point.get(f"prune:{i}", 0.0))
            bits = 4 if point.get(f"bits:{i}") and width < 32 else width
            size += int((1000 + 500 * i) * kept * bits / 8)
            macs += int(10_000 * kept)
        if point.get("precision") == "int8":
            size += 40
        return Cost(weight_bytes=size, macs=macs, flash_bytes=size + 900, ram_bytes=600, instructions=macs * 3)

    def measure(self, point: Point) -> Trial:
        self.measured.append(point)
        drop = self.drop(point)
        return Trial(point, point.key, self.cost(point), 0.9 - drop, drop)

    def probe(self, point: Point) -> Probe:
        return Probe(
            point,
            Cost(weight_bytes=self.cost(point).weight_bytes, macs=self.cost(point).macs),
            self.drop(point),
        )

    def explore(self, max_drop, budget=None, **options) -> Explorer:
        budget = budget or Budget(max_drop=max_drop)
        explorer = Explorer(self.space, Goal(budget), self.measure, self.probe, max_drop, **options)
        explorer.run()
        return explorer


def trials_of(explorer: Explorer) -> list[Trial]:
    return [t for t, _ in (*explorer.untrained.asked.values(), *explorer.trained.asked.values())]


def result_of(explorer: Explorer) -> Trial | None:
    return cheapest(trials_of(explorer), explorer.goal, explorer.max_drop)


drops = st.sampled_from([0.0, 0.001, 0.003, 0.005, 0.0099, 0.01, 0.013, 0.02, 0.04, 0.1])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6), small=drops, large=drops, level=st.sampled_from([1, 2]),
    trials=st.integers(4, 60), train=st.booleans(), jitter=st.sampled_from([0.0, 0.004, 0.02]),
)  # fmt: skip
def test_a_larger_tolerance_never_gives_a_larger_model(seed, small, large, level, trials, train, jitter):
    small, large = sorted((small, large))
    world = World(seed, jitter=jitter)
    options = {"level": level, "trials": trials, "train": train}
    strict, loose = world.explore(small, **options), world.explore(large, **options)
    assert {t.point for t in trials_of(strict)} <= {t.point for t in trials_of(loose)}
    first, second = result_of(strict), result_of(loose)
    if first is not None:
        assert second is not None
        assert strict.goal.key(second.cost) <= strict.goal.key(first.cost)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), flash=st.integers(1500, 20_000), small=drops, large=drops)
def test_what_fits_at_a_small_tolerance_fits_at_a_larger_one(seed, flash, small, large):
    small, large = sorted((small, large))
    fits = []
    for tolerance in (small, large):
        budget = Budget(flash_bytes=flash, max_drop=tolerance)
        best = result_of(World(seed).explore(tolerance, budget, level=2, trials=40))
        fits.append(best is not None and not budget.check(best.cost, best.drop))
    assert fits[1] or not fits[0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), few=st.integers(4, 30), more=st.integers(0, 30))
def test_more_trials_only_add(seed, few, more):
    points = []
    for trials in (few, few + more):
        points.append([t.point for t in trials_of(World(seed).explore(0.02, level=2, trials=trials, train=False))])
    assert points[1][: len(points[0])] == points[0]


def test_never_more_trials_than_asked_for():
    for trials in (4, 9, 20):
        explorer = World(3).explore(0.05, level=2, trials=trials)
        assert len(trials_of(explorer)) <= trials


def test_training_is_left_alone_when_the_limits_are_met_without():
    world = World(1)
    world.explore(0.05, Budget(flash_bytes=8000, max_drop=0.05), level=2, trials=40)
    assert not any(p.get("train") for p in world.measured)


def test_training_is_tried_when_nothing_else_fits():
    world = World(1, jitter=0.0)
    budget = Budget(flash_bytes=6000, max_drop=0.01)
    best = result_of(world.explore(0.01, budget, level=2, trials=80))
    assert best is not None
    assert best.point.get("train")
    assert not budget.check(best.cost, best.drop)


def test_level_two_is_at_least_as_small():
    for seed in range(10):
        one = result_of(World(seed).explore(0.02, level=1, trials=200))
        two = result_of(World(seed).explore(0.02, level=2, trials=200))
        assert two.cost.flash_bytes <= one.cost.flash_bytes


def test_greedy_moves_reach_what_no_single_tolerance_gives():
    worse = 0
    for seed in range(10):
        one = result_of(World(seed, jitter=0.0).explore(0.02, level=1, trials=300))
        two = result_of(World(seed, jitter=0.0).explore(0.02, level=2, trials=300))
        worse += two.cost.flash_bytes < one.cost.flash_bytes
    assert worse >= 5


def test_a_point_is_measured_once():
    world = World(5)
    known: dict[Point, Trial] = {}

    def measure(point):
        if point not in known:
            known[point] = world.measure(point)
        return known[point]

    explorer = Explorer(world.space, Goal(Budget(max_drop=0.05)), measure, world.probe, 0.05, level=2, trials=60)
    explorer.run()
    assert len(world.measured) == len(set(world.measured))
    assert len(known) > 10


def test_zero_tolerance_returns_what_loses_nothing():
    world = World(2, jitter=0.0)
    best = result_of(world.explore(0.0, level=2, trials=40, train=False))
    assert best.point == FLOAT  # every move costs some score in this world


def test_without_a_tolerance_the_climb_ends_where_the_limits_are_met():
    world = World(4, jitter=0.0)
    budget = Budget(flash_bytes=5000)
    explorer = world.explore(None, budget, level=2, trials=300, train=False)
    best = result_of(explorer)
    assert explorer.goal.excess(best.cost) == 0
    strictest = min(t.drop for t in trials_of(explorer) if explorer.goal.excess(t.cost) == 0)
    assert best.drop == strictest


def test_an_impossible_limit_ends_with_the_nearest():
    world = World(4)
    budget = Budget(flash_bytes=10, max_drop=0.01)
    explorer = world.explore(0.01, budget, level=2, trials=40)
    trials = trials_of(explorer)
    near = nearest(trials, budget)
    assert all(budget.check(t.cost, t.drop) for t in trials)
    assert budget.excess(near.cost, near.drop) == min(budget.excess(t.cost, t.drop) for t in trials)


def test_failed_trials_are_never_chosen():
    world = World(6)
    failing = Trial(INT8, "", Cost(flash_bytes=1), None, None, error="no")
    plain = world.measure
    world.measure = lambda p: failing if p == INT8 else plain(p)  # type: ignore[method-assign]
    best = result_of(world.explore(0.05, level=2, trials=40))
    assert best.score is not None


def test_an_interruption_keeps_what_was_measured():
    world, plain = World(7), World(7).measure

    def measure(point):
        if len(seen) == 6:
            raise KeyboardInterrupt
        seen.append(point)
        return plain(point)

    seen: list[Point] = []
    explorer = Explorer(world.space, Goal(Budget(max_drop=0.05)), measure, world.probe, 0.05)
    with pytest.raises(KeyboardInterrupt):
        explorer.run()
    assert len(trials_of(explorer)) == 6
    assert result_of(explorer) is not None


def test_assignments_are_nested_and_end_at_the_harshest():
    world = World(8, jitter=0.0)
    table = sensitivities(world.space, world.probe)
    choices = assignments(table, world.space)
    assert dict(choices[-1]) == {a: v[-1] for a, v in world.space.axes.items()}
    for mild, harsh in itertools.pairwise(choices):
        for axis, value in mild:
            values = world.space.axes[axis]
            assert values.index(dict(harsh)[axis]) >= values.index(value)


def test_pareto_set_is_exactly_the_unbeaten():
    world = World(9)
    trials = trials_of(world.explore(0.05, level=2, trials=60))
    kept = pareto(trials)

    def vector(t):
        return (-t.score, t.cost.flash_bytes, t.cost.ram_bytes, t.cost.instructions)

    for t in trials:
        beaten = any(all(x <= y for x, y in zip(vector(o), vector(t))) and vector(o) != vector(t) for o in trials)
        assert beaten or any(vector(k) == vector(t) for k in kept)
        if t in kept:
            assert not beaten


@pytest.mark.parametrize("top", [0.0, 0.01, 1.0, 30.0])
def test_the_ladder_rises_and_is_a_prefix_of_every_longer_one(top):
    short, long = list(ladder(top)), list(ladder(None))
    assert short == sorted(set(short))
    assert long[: len(short)] == short


def test_points_read_back():
    point = INT8.moved("prune:a.b", 0.5).moved("train", True)
    assert Point.from_key(point.key) == point
    assert point.moved("train", False).moved("prune:a.b", None) == INT8
    trial = Trial(point, "[[step]]", Cost(flash_bytes=5), 0.5, 0.1, 1.0)
    assert Trial.from_dict(trial.to_dict()) == trial
