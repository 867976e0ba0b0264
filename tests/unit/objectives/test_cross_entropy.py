from __future__ import annotations

import math

import pytest
import torch
from objective_nets import IDENTITY

from thrifty.errors import KnobError
from thrifty.objectives import CrossEntropy


def test_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0)]])
    assert float(CrossEntropy().loss(IDENTITY, scores, torch.tensor([1]))) == pytest.approx(-math.log(0.75))


def test_soft_labels_are_the_mean_of_hard_ones():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    soft = CrossEntropy().loss(IDENTITY, x, torch.tensor([[0.25, 0.75, 0.0]]))
    hard = [CrossEntropy().loss(IDENTITY, x, torch.tensor([i])) for i in (0, 1)]
    assert float(soft) == pytest.approx(float(0.25 * hard[0] + 0.75 * hard[1]))


def test_smoothing_spreads_the_label():
    x = torch.tensor([[1.0, -2.0]])
    smooth = CrossEntropy(label_smoothing=0.2).loss(IDENTITY, x, torch.tensor([0]))
    spread = CrossEntropy().loss(IDENTITY, x, torch.tensor([[0.9, 0.1]]))
    assert float(smooth) == pytest.approx(float(spread), rel=1e-6)


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_refuses_a_share_outside_its_range(share):
    with pytest.raises(KnobError, match="label_smoothing"):
        CrossEntropy(share)
