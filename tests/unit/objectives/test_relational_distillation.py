from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_nets import IDENTITY, OUTPUT, STUDENT, TEACHER, Fixed, Net, rotation, rows

from thrifty.errors import KnobError
from thrifty.objectives import RelationalDistillation
from thrifty.objectives.features import distances
from thrifty.objectives.relational_distillation import relative_distances


def loss(teacher, student, **knobs):
    return RelationalDistillation(Fixed(teacher), layers=OUTPUT, **knobs).loss(IDENTITY, student, None)


def test_by_hand():
    assert float(loss(TEACHER, STUDENT)) == pytest.approx(0.0441559, abs=5e-8)


def test_relative_distances_by_hand():
    found = relative_distances(torch.tensor(TEACHER, dtype=torch.float64))
    assert found[0, 1].item() == pytest.approx(1.24264069, abs=5e-9)
    assert found[0, 2].item() == found[1, 2].item() == pytest.approx(0.87867966, abs=5e-9)


def test_zero_for_rotation_scale_and_translation_but_not_for_scale_of_single_rows():
    h = rows()
    assert float(loss(h, 3.0 * h @ rotation(5) + 7)) == pytest.approx(0, abs=1e-20)
    assert float(loss(h, h * rows(8, 1, seed=2))) > 1e-3


def test_widths_may_differ():
    h = rows()
    assert float(loss(h, torch.cat([h, torch.zeros(8, 4, dtype=h.dtype)], 1) @ rotation(9))) == pytest.approx(
        0, abs=1e-20
    )


def test_equal_rows_are_pairs_too():
    """A mask "distance > 0" would drop them, and pair up the wrong distances."""
    student = torch.tensor([[0.0], [0.0], [2.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    # distances 0, 2, 2 and 1, 2, 1; over their means 0, 3/2, 3/2 and 3/4, 3/2, 3/4
    expected = (0.5 * 0.75**2 + 0 + 0.5 * 0.75**2) / 3
    assert float(loss(teacher, student)) == pytest.approx(expected)


def test_gradient_at_equal_rows_is_finite():
    for h in (torch.zeros(4, 3), torch.tensor([[1.0], [1.0], [2.0]])):
        student = h.double().requires_grad_(True)
        value = loss(rows(len(h)), student)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(student.grad).all()


def test_distances_are_those_of_numpy_far_from_the_origin():
    h = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    expected = np.linalg.norm(h[:, None].astype(np.float64) - h[None], axis=2)
    found = distances(torch.from_numpy(h) + 100)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    np.testing.assert_allclose(distances(torch.from_numpy(h)).numpy(), expected, rtol=1e-5)
    assert not found.diagonal().any()


def test_nan_is_not_hidden():
    broken = rows()
    broken[0, 0] = torch.nan
    assert torch.isnan(loss(rows(), broken))


def test_one_row_gives_zero():
    assert float(loss(rows(1), rows(1, seed=1))) == 0


def test_mean_over_layers():
    torch.manual_seed(0)
    teacher, student, x = Net(8).eval(), Net(4).eval(), torch.randn(7, 5)

    def value(layers):
        return float(RelationalDistillation(teacher, layers).loss(student, x, None).detach())

    assert value(("low", "high")) == pytest.approx((value("low") + value("high")) / 2)


def test_gradient_in_float64():
    student = rows(5, 3, seed=1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h: loss(rows(5, 3), h), (student,))


def test_refuses_knobs_outside_their_range():
    with pytest.raises(KnobError, match="beta"):
        RelationalDistillation(Fixed(TEACHER), OUTPUT, beta=0)
