"""A teacher composes with every technique that trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_nets import equal_states, state_of
from small import small_task, trained
from torch import nn

from thrifty.compress import Prune, Quantize, Train
from thrifty.errors import KnobError, NoMatch
from thrifty.objectives import CrossEntropy, Distillation, GraphDistillation, GraphSmoothness, WeightedSum, with_teacher
from thrifty.task import Task


@pytest.fixture(scope="module")
def task():
    return small_task()


@pytest.fixture(scope="module")
def net():
    return trained()


def divergence(model, teacher, task):
    """Return the mean KL from the teacher's to the model's probabilities, on validation data."""
    scores = [torch.from_numpy(task.outputs(m)).double().log_softmax(1) for m in (teacher, model)]
    return float((scores[0].exp() * (scores[0] - scores[1])).sum(1).mean())


TECHNIQUES = {
    "prune": Prune(0.5, recover_epochs=6, recover_lr=0.02),
    "prune by taylor": Prune(0.5, importance="taylor", recover_epochs=6, recover_lr=0.02),
    "quantize": Quantize(bits=8, weight_bits=2, epochs=6, lr=0.02, calibration_samples=32),
    "train": Train(epochs=6, lr=0.02),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_techniques_recover_with_the_float_model(name, net, task):
    """The result is nearer to the teacher than one that was trained with labels alone."""
    before = state_of(net)
    start = Prune(0.5, recover_epochs=0).edit(net, task) if name == "train" else net
    plain = TECHNIQUES[name].edit(start, task)
    taught = TECHNIQUES[name].edit(start, with_teacher(task, net))
    assert equal_states(state_of(net), before)
    assert divergence(taught, net, task) < 0.5 * divergence(plain, net, task)
    assert task.score(taught) >= 0.9


@pytest.mark.parametrize("objective", ["graph_distillation", "relational_distillation"])
def test_geometry_recovers_a_pruned_model(objective, net, task):
    taught = with_teacher(task, net, objective)
    edited = TECHNIQUES["prune"].edit(net, taught)
    assert edited.head.in_features < net.head.in_features
    assert task.score(edited) >= 0.9


@pytest.mark.parametrize("objective", ["graph_distillation", "relational_distillation"])
@pytest.mark.parametrize("layers", [(), ("stem", "body"), ("",)])
def test_geometry_trains_a_quantised_model(objective, layers, net, task):
    taught = with_teacher(task, net, objective, weight=1.0, layers=layers)
    assert task.score(TECHNIQUES["quantize"].edit(net, taught)) >= 0.9


def test_the_sum(net, task):
    (own, one), (taught, weight) = with_teacher(task, net).objective.pairs
    assert (own, one, weight) == (CrossEntropy(), 1.0, 1.0)
    assert (type(taught), taught.alpha, taught.temperature) == (Distillation, 1.0, 4.0)
    (_, _), (taught, weight) = with_teacher(task, net, "graph_distillation", weight=2, k=5).objective.pairs
    assert (type(taught), taught.k, weight) == (GraphDistillation, 5, 2.0)
    assert task.objective is None


def test_the_tasks_own_objective_stays(net, task):
    own = Task(task.train, task.validation, objective=GraphSmoothness())
    assert with_teacher(own, net).objective.pairs[0] == (GraphSmoothness(), 1.0)
    twice = with_teacher(with_teacher(task, net), net, "relational_distillation").objective
    assert isinstance(twice.pairs[0][0], WeightedSum)
    assert torch.isfinite(twice.loss(net, task.train.x[:8], task.train.y[:8]))


def test_regression_keeps_the_geometry():
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    task = Task.from_arrays(x, x[:, :1] * 2, test=0)
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(3, w), nn.ReLU(), nn.Linear(w, 1)) for w in (8, 4))
    task.fit(teacher, epochs=20, lr=0.05)
    task.fit(student, epochs=20, lr=0.05, objective=with_teacher(task, teacher, "relational_distillation").objective)
    assert task.score(student) > -1.0
    with pytest.raises(KnobError, match="no classes"):
        with_teacher(task, teacher)


def test_refusals(net, task):
    with pytest.raises(NoMatch, match="close: distillation"):
        with_teacher(task, net, "destillation")
    with pytest.raises(KnobError, match="close: temperature"):
        with_teacher(task, net, temprature=3)
    with pytest.raises(KnobError, match="a teacher is a model"):
        with_teacher(task, "net.py:Net")
    with pytest.raises(KnobError, match="weight"):
        with_teacher(task, net, weight=-1)
