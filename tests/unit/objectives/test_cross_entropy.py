from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from thrifty.errors import KnobError
from thrifty.objectives import OBJECTIVES, CrossEntropy


def test_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0)]])
    assert float(CrossEntropy().loss(nn.Identity(), scores, torch.tensor([1]))) == pytest.approx(
        -math.log(0.75)
    )


def test_soft_labels_are_the_mean_of_hard_ones():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    soft = CrossEntropy().loss(nn.Identity(), x, torch.tensor([[0.25, 0.75, 0.0]]))
    hard = [CrossEntropy().loss(nn.Identity(), x, torch.tensor([i])) for i in (0, 1)]
    assert float(soft) == pytest.approx(float(0.25 * hard[0] + 0.75 * hard[1]))


def test_smoothing_spreads_the_label():
    x = torch.tensor([[1.0, -2.0]])
    smooth = CrossEntropy(smoothing=0.2).loss(nn.Identity(), x, torch.tensor([0]))
    assert float(smooth) == pytest.approx(
        float(CrossEntropy().loss(nn.Identity(), x, torch.tensor([[0.9, 0.1]]))), rel=1e-6
    )
    with pytest.raises(KnobError):
        CrossEntropy(smoothing=1.0)


def test_gradient_in_float64():
    y = torch.tensor([0, 2])
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: CrossEntropy(0.1).loss(nn.Identity(), t, y), (x,))


def test_table():
    assert {"cross_entropy": CrossEntropy} == OBJECTIVES
