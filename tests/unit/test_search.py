"""optimize: what it finds, what it promises, what it refuses, how it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stubs
import torch
from checks import bits_of
from small import TinyNet, small_task, trained
from torch import nn

from thrifty.budget import Budget
from thrifty.compress import compress
from thrifty.compress.teach import Lesson
from thrifty.errors import (
    CaptureError,
    DataError,
    Incompatible,
    KnobError,
    MissingExtra,
    NoMatch,
    StoreError,
    ThriftyError,
    UnsupportedModel,
)
from thrifty.objectives import Teaching, with_teacher
from thrifty.report import Report
from thrifty.search import optimize
from thrifty.search.recipes import recipe_of, space_of
from thrifty.search.space import Point
from thrifty.task import Task

SUPPORT = Path(__file__).parent.parent / "support"


@pytest.fixture(scope="module")
def task():
    return small_task()


@pytest.fixture(scope="module")
def net():
    return trained(kind=TinyNet, epochs=8)


@pytest.fixture(scope="module")
def spare():
    return trained(spare=True, kind=TinyNet, epochs=8)


@pytest.fixture
def fast(monkeypatch):
    """Counted costs instead of measured ones."""
    stubs.install(monkeypatch.setattr)


# what it finds


def test_the_main_job_really_built_and_emulated(net, task, tmp_path):
    """No stand-ins: built for a Cortex-M4, run in the emulator, proven, written, reported."""
    before = bits_of(net)
    result = optimize(
        net, task, Budget(max_drop=0.02, flash_bytes=60_000), trials=5, train=False, folder=tmp_path / "c"
    )
    assert result.feasible
    assert result.report.within_budget
    assert bits_of(net) == before
    first = result.trials[0]
    assert first.point == Point()
    assert result.chosen.cost.flash_bytes < first.cost.flash_bytes / 1.3
    assert result.chosen.cost.instructions < first.cost.instructions
    assert set(result.report.parity.samples) == {"program", "host C", "cortex-m4 (emulated)", "torch"}
    assert result.report.parity.clean
    assert (tmp_path / "c" / "model.c").exists()
    assert result.deployment.image.elf.exists()
    assert result.report.rows[0].step == "start"
    assert result.report.rows[-1].step == "deploy"
    with torch.no_grad():
        outputs = result.model(task.test.x)
    assert task.score_outputs(outputs.numpy(), "test") == result.report.test_scores[1]
    assert Report.from_json(result.report.to_json()).verdict == result.report.verdict == str(result)
    assert result.report.layers
    assert result.report.memory.arena_bytes >= result.report.memory.bound_bytes
    assert "svg" in result.report.to_html()


def test_within_the_drop_the_cheapest_trial_is_chosen(fast, net, task):
    result = optimize(net, task, Budget(max_drop=0.05), trials=14, level=2)
    fitting = [t for t in result.trials if t.within(0.05)]
    assert result.chosen.cost.flash_bytes == min(t.cost.flash_bytes for t in fitting)
    assert result.chosen in result.pareto
    assert len(result.trials) <= 14
    assert {c.name for c in result.report.candidates if c.chosen}
    assert len(result.report.candidates) == len(result.trials)


def test_zero_drop_removes_what_is_exactly_removable(fast, spare, task):
    """Duplicate and dead channels go, whatever else does."""
    result = optimize(spare, task, Budget(max_drop=0.0), trials=5, train=False)
    assert result.feasible
    assert result.chosen.drop <= 0
    assert result.chosen.point.get("lossless")
    exact = next(t for t in result.trials if t.point == Point().moved("lossless", True))
    assert exact.drop == 0
    assert exact.cost.params < result.trials[0].cost.params


def test_zero_drop_splits_a_layer_of_low_rank(fast, task):
    torch.manual_seed(0)
    wide = nn.Linear(64, 64)
    with torch.no_grad():
        wide.weight.copy_(torch.randn(64, 3) @ torch.randn(3, 64) * 0.1)
    model = nn.Sequential(nn.Flatten(), wide, nn.ReLU(), nn.Linear(64, 4)).eval()
    result = optimize(model, task, Budget(max_drop=0.0), trials=2, train=False)
    assert result.trials[1].drop == 0
    assert result.trials[1].cost.params < result.trials[0].cost.params / 3


def test_zero_drop_without_anything_to_remove_never_loses_score(fast, net, task):
    noisy = trained(epochs=2, kind=TinyNet)  # on the edge: quantisation changes some answers
    for model in (net, noisy):
        result = optimize(model, task, Budget(max_drop=0.0), trials=5, train=False)
        assert result.feasible
        assert result.chosen.score >= task.score(model)
        assert not result.chosen.point.get("lossless")


def test_an_impossible_budget_is_reported_with_the_nearest(fast, net, task):
    budget = Budget(flash_bytes=2100, max_drop=0.01)
    result = optimize(net, task, budget, trials=8)
    assert not result.feasible
    assert [v.limit for v in result.violations] == ["flash"]
    assert not result.report.within_budget
    assert str(result).startswith("NOT within budget")
    excess = {t.point: budget.excess(t.cost, t.drop) for t in result.trials}
    assert excess[result.chosen.point] == min(excess.values())
    assert any("nearest" in note for note in result.report.notes)


def test_nothing_is_trained_when_it_need_not_be(fast, net, task):
    result = optimize(net, task, Budget(flash_bytes=7000, max_drop=0.05), trials=20)
    assert result.feasible
    assert not any(t.point.get("train") for t in result.trials)
    result = optimize(net, task, Budget(max_drop=0.02), trials=12, train=False)
    assert not any("epochs" in t.recipe and "recover_epochs = 0" not in t.recipe for t in result.trials)


def test_a_larger_drop_never_gives_a_larger_model(fast, net, task):
    sizes = []
    for drop in (0.0, 0.02, 0.2):
        chosen = optimize(net, task, Budget(max_drop=drop), trials=8, level=2, train=False).chosen
        sizes.append(chosen.cost.flash_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_the_memory_of_a_board_is_a_limit(fast, net, task):
    result = optimize(net, task, Budget(max_drop=0.05), target="nrf52840", trials=4, train=False)
    assert result.report.budget.flash_bytes == 1048576
    assert "flash" in str(result)


def test_on_the_host_counted_numbers_decide(net, task):
    result = optimize(net, task, Budget(max_drop=0.05), target="host", trials=4, train=False)
    fitting = [t.cost.weight_bytes for t in result.trials if t.within(0.05)]
    assert result.chosen.cost.weight_bytes == min(fitting) < result.trials[0].cost.weight_bytes
    assert result.report.parity.clean


def test_equal_seeds_give_equal_searches(fast, net, task):
    runs = [optimize(net, task, Budget(max_drop=0.03), trials=7, level=2) for _ in range(2)]
    plain = [[replace(t, seconds=0.0) for t in r.trials] for r in runs]
    assert plain[0] == plain[1]
    assert bits_of(runs[0].model) == bits_of(runs[1].model)


def test_kept_layers_stay_as_they_are(fast, net, task):
    result = optimize(net, task, Budget(max_drop=0.2), trials=8, train=False, keep=("sec*", "head"))
    axes = {axis for t in result.trials for axis, _ in t.point.settings}
    assert not any("second" in axis or "head" in axis for axis in axes)
    with pytest.raises(NoMatch, match=r"keep: 'secund' matches no layer; close: second"):
        optimize(net, task, Budget(max_drop=0.2), keep=("secund",))


def test_optuna_samples_the_same_space(fast, net, task):
    pytest.importorskip("optuna")
    runs = [optimize(net, task, Budget(max_drop=d), trials=9, sampler="optuna", train=False) for d in (0.0, 0.1)]
    points = [[t.point for t in r.trials] for r in runs]
    assert points[0] == points[1]  # the tolerance does not steer it
    assert len(points[0]) == len(set(points[0])) == 9
    assert runs[1].chosen.cost.flash_bytes <= runs[0].chosen.cost.flash_bytes


# honesty about data


def test_the_test_split_is_touched_once_at_the_end(fast, net, task, monkeypatch):
    log = []
    plain_split, plain_measure = Task.split, stubs.counted

    def split(self, name):
        log.append(name)
        return plain_split(self, name)

    def measure(*arguments):
        log.append("trial")
        return plain_measure(*arguments)

    monkeypatch.setattr(Task, "split", split)
    monkeypatch.setattr(stubs.thrifty.deploy, "measure", measure)
    optimize(net, task, Budget(max_drop=0.05), trials=6)
    first = log.index("test")
    assert "trial" not in log[first:]
    assert log.count("trial") == 7  # and the chosen recipe once more, without its teacher


def test_the_choice_does_not_depend_on_the_test_split(fast, net, task):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(0, 1, task.test.x.shape).astype(np.float32))
    other = replace(task, test=type(task.test)(x, task.test.y.flip(0)))
    runs = [optimize(net, t, Budget(max_drop=0.03), trials=6, train=False) for t in (task, other)]
    assert runs[0].chosen.point == runs[1].chosen.point
    assert runs[0].report.test_scores != runs[1].report.test_scores


def test_without_a_test_split_it_says_so(fast, net, task):
    result = optimize(net, replace(task, test=None), Budget(max_drop=0.05), trials=2, train=False)
    assert result.report.test_scores is None
    assert any("no test split" in note for note in result.report.notes)


# interruption and resumption


class Stop:
    """Raises KeyboardInterrupt when the given number of trials is done."""

    def __init__(self, after):
        self.after, self.seen = after, []

    def __call__(self, done, total, text):
        self.seen.append((done, total, text))
        if done >= self.after:
            raise KeyboardInterrupt


def test_interrupted_it_keeps_what_it_has(fast, net, task):
    result = optimize(net, task, Budget(max_drop=0.05), trials=10, progress=Stop(3))
    assert result.interrupted
    assert result.report.interrupted
    assert len(result.trials) == 3
    assert any("interrupted after 3 of at most 10 trials" in note for note in result.report.notes)
    assert result.model is not None
    assert result.report.test_scores is None  # kept for the end of the resumed search
    assert any("test split is untouched" in note for note in result.report.notes)
    assert result.report.environment["compiler"]
    with pytest.raises(KeyboardInterrupt):
        optimize(net, task, Budget(max_drop=0.05), progress=Stop(0))


def test_a_time_limit_ends_it(fast, net, task):
    result = optimize(net, task, Budget(max_drop=0.05), trials=30, time_limit=1e-6)
    assert len(result.trials) == 1
    assert any("time limit" in note for note in result.report.notes)


def test_resumed_it_measures_nothing_twice(fast, net, task, tmp_path, monkeypatch):
    budget = Budget(max_drop=0.03)
    whole = optimize(net, task, budget, trials=7)
    optimize(net, task, budget, trials=7, state=tmp_path, progress=Stop(5))
    kept = stubs.lines_of(tmp_path)
    result = optimize(net, task, budget, trials=7, state=tmp_path)
    assert stubs.lines_of(tmp_path)[: len(kept)] == kept
    strip = [[replace(t, seconds=0.0) for t in r.trials] for r in (whole, result)]
    assert strip[0] == strip[1]
    assert bits_of(whole.model) == bits_of(result.model)

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(stubs.thrifty.deploy, "measure", never)
    monkeypatch.setattr(Task, "fit", never)
    again = optimize(net, task, budget, trials=7, state=tmp_path)
    assert bits_of(again.model) == bits_of(result.model)
    assert any("read from the state" in note for note in again.report.notes)


def test_a_different_search_does_not_resume(fast, net, task, tmp_path):
    optimize(net, task, Budget(max_drop=0.05), trials=1, train=False, state=tmp_path)
    with pytest.raises(StoreError, match=r"budget: max_drop=0\.05 there, max_drop=0\.1 now"):
        optimize(net, task, Budget(max_drop=0.1), trials=1, train=False, state=tmp_path)
    with pytest.raises(StoreError, match="model: "):
        optimize(trained(epochs=2, kind=TinyNet), task, Budget(max_drop=0.05), trials=1, train=False, state=tmp_path)
    with pytest.raises(StoreError, match=r"data: .*\n.*seed: 0 there, 5 now"):
        optimize(net, small_task(seed=5), Budget(max_drop=0.05), trials=1, train=False, state=tmp_path)
    more = optimize(net, task, Budget(max_drop=0.05), trials=3, train=False, state=tmp_path)
    assert len(more.trials) == 3  # asking for more trials is going on


def test_another_teacher_does_not_resume(fast, net, task, tmp_path):
    teachers = [trained(epochs=epochs, kind=TinyNet) for epochs in (1, 2)]
    ask = {"budget": Budget(max_drop=0.05), "trials": 1, "train": False, "state": tmp_path}
    optimize(net, with_teacher(task, teachers[0]), **ask)
    optimize(net, with_teacher(task, teachers[0]), **ask)
    for other in (with_teacher(task, teachers[1]), with_teacher(task, teachers[0], temperature=2.0), task):
        with pytest.raises(StoreError, match="objective: "):
            optimize(net, other, **ask)


# --- teachers


TRAINED = {"budget": Budget(max_drop=0.03), "trials": 7}  # the chosen recipe of this search trains


def test_the_report_says_what_the_teacher_bought(fast, net, task, tmp_path):
    result = optimize(net, task, **TRAINED, state=tmp_path)
    (table,) = [t for t in result.report.tables if "teacher" in t.title]
    scores = {row[0]: row[1] for row in table.rows}
    assert set(scores) == {"distillation from the float model", "no teacher"}
    assert result.chosen.score == max(scores.values()) == task.score(result.model)
    assert any(f"{scores['distillation from the float model'] - scores['no teacher']:+.4f}" in n
               for n in result.report.notes)  # fmt: skip
    kept = optimize(net, task, **TRAINED, teaching=Teaching(compare=False))
    assert any("not compared" in n for n in kept.report.notes)
    assert not [t for t in kept.report.tables if "teacher" in t.title]


def test_a_comparison_is_not_made_twice(fast, net, task, tmp_path, monkeypatch):
    first = optimize(net, task, **TRAINED, state=tmp_path)
    monkeypatch.setattr(stubs.thrifty.search.bench, "compress", None)
    monkeypatch.setattr(stubs.thrifty.deploy, "measure", None)
    again = optimize(net, task, **TRAINED, state=tmp_path)
    assert [t.rows for t in again.report.tables] == [t.rows for t in first.report.tables]


def test_what_scores_lower_with_the_teacher_is_not_kept(fast, net, task, monkeypatch):
    monkeypatch.setattr(Lesson, "kept", False)
    result = optimize(net, task, **TRAINED)
    assert "trained without it is kept" in next(n for n in result.report.notes if n.startswith("teacher ("))
    assert bits_of(result.model) == bits_of(compress(net, result.recipe, task, teaching=None))
    assert result.chosen in result.trials
    assert result.chosen.score == task.score(result.model)


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(net, task):
    wide = Teaching(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)))
    with pytest.raises(Incompatible, match=r"student gives \(4, 4\).*teacher \(4, 9\)"):
        optimize(net, task, Budget(max_drop=0.03), teaching=wide)


def test_the_default_teacher_is_part_of_what_is_resumed(fast, net, task, tmp_path):
    ask = {"budget": Budget(max_drop=0.05), "trials": 1, "state": tmp_path}
    optimize(net, task, **ask)
    for other in (None, Teaching(weight=2.0), Teaching(trained(epochs=1, kind=TinyNet))):
        with pytest.raises(StoreError, match="objective: "):
            optimize(net, task, **ask, teaching=other)
    optimize(net, task, **ask, teaching=Teaching(compare=False))


KILLED = """
    import sys
    sys.path.insert(0, {support!r})
    import stubs
    from small import TinyNet, small_task, trained
    from thrifty.budget import Budget
    from thrifty.search import optimize
    stubs.install()
    def progress(done, total, text):
        print(done, flush=True)
    net = trained(kind=TinyNet, epochs=8)
    optimize(net, small_task(), Budget(max_drop=0.03), trials=7, state={state!r}, progress=progress)
    print("finished", flush=True)
"""


def test_killed_it_goes_on(fast, net, task, tmp_path):
    code = textwrap.dedent(KILLED.format(support=str(SUPPORT), state=str(tmp_path / "state")))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    done = 0
    for line in child.stdout:
        done = int(line)
        if done == 4:
            time.sleep(0.05)
            os.kill(child.pid, signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    kept = [json.loads(line) for line in (tmp_path / "state" / "search.jsonl").read_text().splitlines()[1:]]
    assert sum(e["kind"] == "trial" for e in kept) >= 4
    calls = []
    plain = stubs.thrifty.deploy.measure
    stubs.thrifty.deploy.measure = lambda *a: calls.append(1) or plain(*a)
    try:
        result = optimize(net, task, Budget(max_drop=0.03), trials=7, state=tmp_path / "state")
    finally:
        stubs.thrifty.deploy.measure = plain
    alone = any("on validation; the model trained" in note for note in result.report.notes)  # without its teacher
    assert len(calls) == len(result.trials) - sum(e["kind"] == "trial" for e in kept) + alone
    assert any("earlier run" in note for note in result.report.notes)


def test_a_full_disk_ends_it_with_what_is_kept(fast, net, task, tmp_path, monkeypatch):
    import thrifty.search.state as state_module

    plain = os.fsync
    left = [4]

    def fsync(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return plain(number)

    monkeypatch.setattr(state_module.os, "fsync", fsync)
    with pytest.raises(StoreError, match="No space left on device"):
        optimize(net, task, Budget(max_drop=0.05), trials=9, state=tmp_path)
    monkeypatch.undo()
    stubs.install(monkeypatch.setattr)
    for line in stubs.lines_of(tmp_path):
        json.loads(line)
    assert len(optimize(net, task, Budget(max_drop=0.05), trials=3, train=False, state=tmp_path / "x").trials) == 3


# bad requests: refused before any work


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ELU())
        self.head = nn.Linear(256, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x)).flatten(1))


class Branching(TinyNet):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def poisoned():
    model = TinyNet()
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = float("nan")
        model.head.bias[1] = float("inf")
    return model


BAD = [
    ("NaN weights", {"model": poisoned}, DataError, ["second.weight", "head.bias"]),
    ("operators", {"model": Strange}, UnsupportedModel, ["first.1", "second.1", "softplus", "elu"]),
    ("branches on data", {"model": Branching}, CaptureError, ["data-dependent"]),
    ("wrong shape", {"model": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())}, CaptureError, ["channels"]),
    ("target", {"target": "cortex-m5"}, NoMatch, ["cortex-m7", "cortex-m4"]),
    ("sampler", {"sampler": "optun"}, NoMatch, ["optuna"]),
    ("empty budget", {"budget": Budget()}, KnobError, ["max_drop"]),
    ("two options", {"trials": 0, "level": 3}, KnobError, ["trials is 0", "level is 3"]),
    ("host", {"target": "host", "budget": Budget(flash_bytes=9)}, KnobError, ["flash_bytes cannot be limited"]),
    ("epochs", {"epochs": 0}, KnobError, ["epochs is 0"]),
    ("time limit", {"time_limit": -1.0}, KnobError, ["time_limit"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_requests_are_refused_before_any_work(task, tmp_path, monkeypatch, options, kind, words):
    def never(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(stubs.thrifty.deploy, "measure", never)
    monkeypatch.setattr(Task, "fit", never)
    model = options.pop("model")() if "model" in options else TinyNet()
    budget = options.pop("budget", Budget(max_drop=0.01))
    with pytest.raises(kind) as caught:
        optimize(model, task, budget, state=tmp_path / "state", **options)
    assert isinstance(caught.value, ThriftyError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_metric_that_gives_nan_is_refused(fast, net, task):
    broken = replace(task, metric=lambda outputs, labels: float("nan"))
    with pytest.raises(DataError, match="metric"):
        optimize(net, broken, Budget(max_drop=0.01))


def test_a_missing_emulator_is_named_before_any_work(net, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'thrifty\[deploy\]'"):
        optimize(net, task, Budget(max_drop=0.01))


def test_when_nothing_can_be_built_every_reason_is_given(net, task, monkeypatch):
    def refuse(*_):
        raise KnobError("no room")

    monkeypatch.setattr(stubs.thrifty.deploy, "measure", refuse)
    with pytest.raises(ThriftyError, match=r"none of the 2 recipes could be built:\n  - float32: no room\n  - int16"):
        optimize(net, task, Budget(max_drop=0.01), trials=2, train=False)


# recipes


def test_every_point_is_a_recipe_that_reads_back(net, task):
    from thrifty.capture import capture
    from thrifty.compress import TECHNIQUES
    from thrifty.recipe import Recipe

    space = space_of(capture(net, task.example))
    assert {a.split(":")[0] for a in space.axes} == {"precision", "prune", "bits"}
    point = space.start.moved("train", True)
    for axis, values in space.axes.items():
        point = space.over(point, [(axis, values[-1])])
    for p in (*space.bases, point):
        recipe = recipe_of(p, epochs=2)
        if recipe.steps:
            assert Recipe.from_toml(recipe.to_toml(), TECHNIQUES) == recipe
    assert [type(s).__name__ for s in recipe_of(point, 2)] == ["Lossless", "Prune", "Quantize"]
    assert recipe_of(Point().moved("train", True), 3).steps[0].epochs == 3
