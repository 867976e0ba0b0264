"""The forecast tied to leave-one-out."""

import numpy as np
import pytest

from thrifty.errors import DataError, KnobError
from thrifty.fewshot import accuracies, uniform
from thrifty.fewshot.episodes import Episodes
from thrifty.fewshot.generalization import GaussianModel, forecast, leave_one_out, shots_needed
from thrifty.fewshot.generalization.anchor import (
    Anchor,
    anchored,
    anchored_curve,
    anchored_shots_needed,
    learn_anchor,
)
from thrifty.fewshot.generalization.forecasting import Offset

QUICK = GaussianModel(samples=500, rehearsals=0)


def uneven(rng, ways=8, each=60, d=64, het=0.6):
    """Classes as networks give them: a falling spectrum that noise and means share, and spreads that differ."""
    scale = np.arange(1, d + 1) ** -0.5
    means = 1.6 * scale * rng.standard_normal((ways, d))
    spread = np.exp(het * rng.standard_normal((ways, 1, 1)))
    x = means[:, None] + spread * scale * rng.standard_normal((ways, each, d))
    return x.reshape(-1, d), np.repeat(np.arange(ways), each)


def test_it_goes_through_leave_one_out():
    rng = np.random.default_rng(0)
    x, y = uneven(rng, each=6, het=1.0)
    anchor = learn_anchor(x, y, QUICK)
    assert anchor.left_out > 0.05
    assert anchor.forecast > 0.05
    said = forecast(x, y, anchor.shots, QUICK)
    assert anchor.shots == 5
    assert anchored(said, anchor).error == pytest.approx(leave_one_out(x, y), abs=1e-9)
    assert anchor.before(anchor.error(0.3)) == pytest.approx(0.3)


def test_it_is_nearer_the_truth_where_classes_are_not_gaussian():
    gaps = {"model": [], "anchored": []}
    for seed in range(120):
        rng = np.random.default_rng(seed)
        x, y = uneven(rng, het=1.0)
        drawn = uniform(y, 8, 10, 20, 1, rng)
        for at in (5, 10):
            true = 1 - accuracies(x, Episodes(drawn.classes, drawn.support[:, :, :at], drawn.query))
            for e, support in enumerate(drawn.support[:, :, :5]):
                rows, labels = support.reshape(-1), np.repeat(np.arange(8), 5)
                found = forecast(x[rows], labels, at, QUICK)
                gaps["model"].append(found.error - true[e])
                gaps["anchored"].append(anchored(found, learn_anchor(x[rows], labels, QUICK)).error - true[e])
    model, mine = np.array(gaps["model"]), np.array(gaps["anchored"])
    better = (np.abs(model) - np.abs(mine)).reshape(120, -1).mean(axis=1)  # by world
    assert better.mean() > 3 * better.std(ddof=1) / np.sqrt(len(better))
    assert abs(mine.mean()) < 0.5 * abs(model.mean())


def test_the_curve_falls_and_contains_its_points():
    x, y = uneven(np.random.default_rng(1), each=6)
    found = anchored_curve(x, y, (1, 5, 20), GaussianModel(samples=500, rehearsals=100))
    errors = [f.error for f in found]
    assert errors == sorted(errors, reverse=True)
    assert all(f.low <= f.error <= f.high for f in found)


def test_shots_needed_meet_the_goal():
    x, y = uneven(np.random.default_rng(2), each=4, het=1.0)
    anchor = learn_anchor(x, y, QUICK)
    goal = 1 - anchored(forecast(x, y, 6, QUICK), anchor).error
    needed = anchored_shots_needed(x, y, goal, QUICK)
    assert 1 - anchored(forecast(x, y, needed.shots, QUICK), anchor).error >= goal - 1e-9
    assert 1 - anchored(forecast(x, y, needed.shots - 1, QUICK), anchor).error < goal
    assert shots_needed(x, y, goal, QUICK).shots != needed.shots
    hopeless = anchored_shots_needed(x, y, 1 - 1e-9, QUICK)
    assert hopeless.shots is None
    assert goal < hopeless.best_accuracy < 1


def test_the_ends_hold_the_answer_between_them():
    x, y = uneven(np.random.default_rng(3), each=6)
    needed = anchored_shots_needed(x, y, 0.7, GaussianModel(samples=200, rehearsals=100))
    ends = [np.inf if k is None else k for k in (needed.optimistic, needed.shots, needed.pessimistic)]
    assert ends == sorted(ends)


def test_no_mistake_in_leave_one_out_is_not_certainty():
    x = np.repeat(10.0 * np.eye(5), 4, axis=0) + 0.1 * np.random.default_rng(4).standard_normal((20, 5))
    anchor = learn_anchor(x, np.repeat(np.arange(5), 4), QUICK)
    assert anchor.left_out == 0
    assert anchor.shift == pytest.approx(0.0)


def test_what_cannot_be_anchored_is_refused():
    x, y = uneven(np.random.default_rng(5), each=3)
    with pytest.raises(DataError, match="two shots"):
        learn_anchor(x[:10], [0, 0, 0, 0, 1, 1, 1, 1, 1, 2], QUICK)
    offset = Offset(0.1, 0.0, (0.1,), 8, 3, 3, "shared", "effective")
    with pytest.raises(KnobError, match="offset"):
        anchored(forecast(x, y, None, QUICK, offset), Anchor(0.0, 0.0, 0.0, 2))
    with pytest.raises(KnobError, match="in \\(0, 1\\)"):
        anchored_shots_needed(x, y, 90, QUICK)
