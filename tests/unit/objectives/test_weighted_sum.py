from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from objective_nets import Net
from torch import nn

from thrifty.errors import KnobError
from thrifty.objectives import (
    OBJECTIVES,
    CrossEntropy,
    Distillation,
    GraphDistillation,
    GraphSmoothness,
    RelationalDistillation,
    Teacher,
    WeightedSum,
)
from thrifty.training import PlainLoss

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


@dataclass(frozen=True)
class Decay:
    """An objective of a user's own, which runs the model by itself."""

    def loss(self, model, x, y):
        return model(x).square().mean() + sum(p.square().sum() for p in model.parameters())


def value(objective, net):
    return float(objective.loss(net, X, Y).detach())


def test_the_sum_is_the_sum():
    torch.manual_seed(0)
    net, teacher = Net(4).eval(), Teacher(Net(8))
    terms = {
        CrossEntropy(): 1.0,
        Distillation(teacher): 0.5,
        GraphDistillation(teacher, layers=("low", "high")): 25.0,
        RelationalDistillation(teacher): 2.0,
        GraphSmoothness(layer="low"): 0.25,
        Decay(): 0.125,
        PlainLoss(3): 3,
    }
    assert value(WeightedSum(terms), net) == pytest.approx(sum(w * value(o, net) for o, w in terms.items()), rel=1e-5)


def test_one_pass_of_each_model():
    net, teacher = Net(4), Teacher(Net(8))
    parts = {
        CrossEntropy(): 1.0,
        PlainLoss(3): 1.0,
        Distillation(teacher): 0.5,
        GraphDistillation(teacher): 25.0,
        WeightedSum({RelationalDistillation(teacher, "low"): 1.0, GraphSmoothness(): 1.0}): 1.0,
    }
    WeightedSum(parts).loss(net, X, Y).backward()
    assert net.passes == 1
    assert teacher.model.passes == 1
    assert int(net.high[1].num_batches_tracked) == 1


def test_an_objective_of_the_users_own_runs_the_model_again():
    net = Net(4)
    WeightedSum({Decay(): 1.0}).loss(net, X, Y)
    assert net.passes == 1
    WeightedSum({CrossEntropy(): 1.0, Decay(): 1.0}).loss(net, X, Y)
    assert net.passes == 3


def test_a_weight_of_zero_counts_for_nothing():
    net = Net(4).eval()
    assert value(WeightedSum({CrossEntropy(): 2.0, GraphSmoothness(): 0}), net) == pytest.approx(
        2 * value(CrossEntropy(), net)
    )


def test_sums_are_printable_values():
    a, b = (WeightedSum({CrossEntropy(0.1): 1, GraphSmoothness(): 0.5}) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert "label_smoothing=0.1" in repr(a)
    assert "Linear" not in repr(Distillation(nn.Linear(2, 2)))


def test_refuses_everything_wrong_at_once():
    with pytest.raises(KnobError, match="no term"):
        WeightedSum({})
    with pytest.raises(KnobError, match=r"is -1.*'cross_entropy' is no objective.*is nan"):
        WeightedSum({CrossEntropy(): -1, "cross_entropy": 1, GraphSmoothness(): math.nan})
    with pytest.raises(KnobError, match="is no objective"):
        WeightedSum({CrossEntropy: 1})


def test_table():
    assert {k: v.__name__ for k, v in OBJECTIVES.items()} == {
        "cross_entropy": "CrossEntropy",
        "distillation": "Distillation",
        "graph_distillation": "GraphDistillation",
        "relational_distillation": "RelationalDistillation",
        "graph_smoothness": "GraphSmoothness",
        "weighted_sum": "WeightedSum",
    }
