"""compress with a teacher: whom it teaches, what the report says of it, and which model is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_nets import equal_states, state_of
from small import small_task, trained
from torch import nn

from thrifty.compress import Lossless, Prune, Quantize, Train, compress
from thrifty.compress.teach import Lesson, parted, taught_in, trains
from thrifty.errors import Incompatible, NoMatch
from thrifty.objectives import GraphSmoothness, Teaching, with_teacher
from thrifty.recipe import Recipe
from thrifty.report import Report
from thrifty.task import Task

PRUNE, QAT = Prune(0.5, recover_epochs=2), Quantize(weight_bits=4, epochs=1, calibration_samples=32)
RECIPE = Recipe((Train(epochs=1), PRUNE, QAT))


@pytest.fixture(scope="module")
def task():
    return small_task()


@pytest.fixture(scope="module")
def net():
    return trained(epochs=2)


def note_of(report):
    (note,) = [n for n in report.notes if n.startswith("teacher (")]
    return note


def test_the_float_model_teaches_what_comes_after_the_first_trainings():
    wide = Teaching(nn.ReLU())
    assert parted(RECIPE, Teaching()) == (Recipe((Train(epochs=1),)), Recipe((PRUNE, QAT)))
    assert parted(RECIPE, wide) == (Recipe(), RECIPE)
    assert parted(RECIPE, None) == (RECIPE, Recipe())
    only = Recipe((Train(epochs=1),))
    assert [taught_in(only, who) for who in (Teaching(), wide, None)] == [False, True, False]
    assert not taught_in(Recipe((Train(epochs=1), Quantize())), Teaching())
    assert [trains(Recipe((s,))) for s in (PRUNE, QAT, Quantize(), Lossless(), Prune(recover_epochs=0))] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_the_teacher_is_the_float_model_that_the_first_trainings_made(net, task):
    """With the whole weight on the teacher, the result is nearer to the trained model than to the given one."""
    begun = Train(epochs=3, lr=0.05).edit(net, task)
    direct = PRUNE.edit(begun, with_teacher(task, begun, weight=3.0, temperature=2.0))
    recipe, teaching = Recipe((Train(epochs=3, lr=0.05), PRUNE)), Teaching(weight=3.0, compare=False)
    assert equal_states(state_of(compress(net, recipe, task, teaching=teaching)), state_of(direct))


def test_the_better_of_both_is_kept_and_the_report_says_so(net, task):
    report, before = Report(), state_of(net)
    result = compress(net, RECIPE, task, report)
    assert equal_states(state_of(net), before)
    (table,) = report.tables
    scores = {row[0]: row[1] for row in table.rows}
    assert set(scores) == {"distillation from the float model", "no teacher"}
    assert task.score(result) == max(scores.values()) == report.rows[-1].score
    assert [row.step for row in report.rows] == ["start", "train 1", "prune 0.5", "quantize 8"]
    gap = scores["distillation from the float model"] - scores["no teacher"]
    assert f"{gap:+.4f} score on validation" in note_of(report)
    plain = compress(net, RECIPE, task, teaching=None)
    assert scores["no teacher"] == task.score(plain)
    again = compress(net, RECIPE, task)
    assert equal_states(state_of(again), state_of(result))  # with a report or without one


def test_what_a_bad_teacher_taught_is_not_kept(net, task):
    torch.manual_seed(0)
    bad, report = Teaching(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), weight=30.0), Report()
    result = compress(net, Recipe((PRUNE,)), task, report, bad)
    assert "the model trained without it is kept" in note_of(report)
    assert equal_states(state_of(result), state_of(compress(net, Recipe((PRUNE,)), task, teaching=None)))
    unasked = Report()
    worse = compress(net, Recipe((PRUNE,)), task, unasked, Teaching(bad.teacher, weight=30.0, compare=False))
    assert task.score(worse) < task.score(result)
    assert "not compared" in note_of(unasked)
    assert not unasked.tables


def test_equal_scores_keep_what_was_taught():
    assert Lesson("x", 0.5, 0.5).kept
    assert Lesson("x", 0.5, None).kept
    assert not Lesson("x", 0.5, 0.6).kept


def test_nobody_teaches_without_training_or_with_an_objective_of_ones_own(net, task):
    own = Task(task.train, task.validation, objective=GraphSmoothness(unit_norm=True))
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    regression = Task.from_arrays(x, x[:, :1], test=0)
    torch.manual_seed(0)
    line = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    for model, given, recipe in (
        (net, task, Recipe((Quantize(calibration_samples=32),))),
        (net, own, Recipe((PRUNE,))),
        (line, regression, Recipe((PRUNE,))),
    ):
        report = Report()
        compress(model, recipe, given, report)
        assert not report.tables
        assert not [n for n in report.notes if "teacher" in n]


def test_a_teacher_for_regression_can_be_asked_for():
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    task = Task.from_arrays(x, x[:, :1], test=0)
    torch.manual_seed(0)
    line = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    report = Report()
    compress(line, Recipe((PRUNE,)), task, report, Teaching(line, "relational_distillation", weight=1.0))
    assert "relational distillation from Sequential" in note_of(report)


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(net, task):
    net.train()
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
    with pytest.raises(Incompatible, match=r"\(4, 4\).*\(4, 9\)"):
        Teaching(wide).task(task, net)
    with pytest.raises(NoMatch, match="'body' matches no module of Sequential"):
        Teaching(wide, "graph_distillation", knobs={"layers": ("body",)}).task(task, net)
    with pytest.raises(NoMatch, match="'trunk' matches no module of SmallNet"):
        Teaching(wide, "graph_distillation", knobs={"layers": ("trunk",), "teacher_layers": ("1",)}).task(task, net)
    assert all(m.training for m in net.modules())
    net.eval()
    assert Teaching(wide, "graph_distillation").task(task, net).objective is not None


def test_training_does_not_go_on_with_another_teacher(net, task, tmp_path):
    from thrifty.errors import DataError

    checkpoint = tmp_path / "c.safetensors"
    for epochs, fails in ((1, False), (1, False), (3, True)):
        teacher = trained(epochs=epochs)
        work = with_teacher(task, teacher)
        if fails:
            with pytest.raises(DataError, match="the objective, or its teacher"):
                work.fit(trained(epochs=1), epochs=2, checkpoint=checkpoint)
        else:
            work.fit(trained(epochs=1), epochs=2, checkpoint=checkpoint)
