from __future__ import annotations

import math

import pytest
import torch
from objective_nets import IDENTITY, Fixed
from torch import nn

from thrifty.errors import Incompatible, KnobError
from thrifty.objectives import CrossEntropy, Distillation

LOG3 = math.log(3.0)
SCORES = torch.tensor([[0.0, 0.0]], dtype=torch.float64)  # the student: one half each
TEACHER = Fixed([[0.0, 2 * LOG3]])  # at T = 2: 1/4 and 3/4
KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
LABEL = torch.tensor([1])


def test_by_hand_with_and_without_the_square():
    without = Distillation(TEACHER, temperature=2.0, alpha=1.0, times_square=False).loss(IDENTITY, SCORES, LABEL)
    assert float(without) == pytest.approx(KL)
    with_it = Distillation(TEACHER, temperature=2.0, alpha=1.0).loss(IDENTITY, SCORES, LABEL)
    assert float(with_it) == pytest.approx(4 * KL)


def test_alpha_shares_with_cross_entropy():
    mixed = Distillation(TEACHER, temperature=2.0, alpha=0.3).loss(IDENTITY, SCORES, LABEL)
    assert float(mixed) == pytest.approx(0.3 * 4 * KL + 0.7 * math.log(2))
    labels_only = Distillation(TEACHER, alpha=0.0).loss(IDENTITY, SCORES, LABEL)
    assert float(labels_only) == float(CrossEntropy().loss(IDENTITY, SCORES, LABEL))


def test_zero_for_equal_scores_and_for_scores_moved_by_a_constant():
    scores = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for moved in (scores, scores + 3.0):
        assert float(Distillation(Fixed(moved), alpha=1.0).loss(IDENTITY, scores, None)) == pytest.approx(0, abs=1e-12)


def test_the_square_keeps_the_size_of_gradients():
    """For large T the gradient tends to (student - teacher) / classes, each without its mean: Hinton's eq. 4."""
    teacher = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[0.5, 0.0, -0.5]], dtype=torch.float64, requires_grad=True)
    Distillation(Fixed(teacher), temperature=1e4, alpha=1.0).loss(IDENTITY, x, None).backward()
    torch.testing.assert_close(x.grad, (x.detach() - teacher) / 3, rtol=1e-3, atol=1e-6)


def test_dense_scores_are_averaged_over_positions():
    teacher, student = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = Distillation(Fixed(teacher), alpha=1.0).loss(IDENTITY, student, None)
    flat = [t.movedim(1, -1).reshape(-1, 3) for t in (teacher, student)]
    assert float(dense) == pytest.approx(float(Distillation(Fixed(flat[0]), alpha=1.0).loss(IDENTITY, flat[1], None)))


def test_under_mixup_the_labels_are_probabilities():
    y = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    scores = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    soft = Distillation(TEACHER, alpha=0.5).loss(IDENTITY, scores, y)
    hard = [float(Distillation(TEACHER, alpha=0.5).loss(IDENTITY, scores, torch.tensor([c]))) for c in (0, 1)]
    assert float(soft) == pytest.approx(0.25 * hard[0] + 0.75 * hard[1])


def test_refuses_other_classes():
    with pytest.raises(Incompatible, match=r"\(1, 3\).*\(1, 2\)"):
        Distillation(TEACHER).loss(IDENTITY, torch.zeros(1, 3), LABEL)


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"temperature": math.nan}, {"alpha": 1.1}, {"alpha": -0.1}])
def test_refuses_knobs_outside_their_range(knobs):
    with pytest.raises(KnobError, match=next(iter(knobs))):
        Distillation(TEACHER, **knobs)


def test_refuses_what_is_no_model():
    for thing in ("net.py:Net", nn.Linear):
        with pytest.raises(KnobError, match="a teacher is a model"):
            Distillation(thing)
