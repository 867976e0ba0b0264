from __future__ import annotations

import pytest
import torch
from objective_nets import IDENTITY, OUTPUT, STUDENT, TEACHER, Fixed, Net, rotation, rows
from torch import nn

from thrifty.errors import DataError, KnobError, NoMatch
from thrifty.objectives import GraphDistillation, WeightedSum
from thrifty.objectives.graph_distillation import neighbours, similarity_graph


def loss(teacher, student, y=None, **knobs):
    return GraphDistillation(Fixed(teacher), layers=OUTPUT, **knobs).loss(IDENTITY, student, y)


# by hand


@pytest.mark.parametrize(("power", "expected"), [(1, 2.0), (2, 1.5), (3, 2.0)])
def test_by_hand(power, expected):
    assert float(loss(TEACHER, STUDENT, power=power)) == pytest.approx(expected)


def test_by_hand_with_its_weight():
    whole = WeightedSum({GraphDistillation(Fixed(TEACHER), layers=OUTPUT): 25})
    assert float(whole.loss(IDENTITY, STUDENT, None)) == pytest.approx(50.0)


def test_graph_by_hand():
    edge = 0.70710678
    expected = torch.tensor([[0, 0, edge], [0, 0, edge], [edge, edge, 0]], dtype=torch.float64)
    torch.testing.assert_close(similarity_graph(torch.tensor(TEACHER, dtype=torch.float64)), expected)


# invariances


def test_zero_for_rotated_and_scaled_rows_but_not_for_moved_ones():
    h = rows()
    assert float(loss(h, 3.0 * h @ rotation(5))) == pytest.approx(0, abs=1e-20)
    assert float(loss(h, h[:, torch.tensor([4, 2, 0, 1, 3])])) == pytest.approx(0, abs=1e-20)
    assert float(loss(h, h * rows(8, 1, seed=2))) == pytest.approx(0, abs=1e-20)
    assert float(loss(h, h + 1)) == pytest.approx(0.0308, abs=5e-5)


def test_zero_for_a_wider_student_of_the_same_geometry():
    h = rows()
    wide = torch.cat([h, torch.zeros(8, 4, dtype=h.dtype)], 1) @ rotation(9)
    assert float(loss(h, wide)) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("seed", range(5))
def test_spectral_radius_is_one(seed):
    assert float(torch.linalg.eigvalsh(similarity_graph(rows(seed=seed))).abs().max()) == pytest.approx(1.0)


def test_intra_and_inter_add_up():
    h, y = rows(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    zero = torch.zeros(8, 5, dtype=h.dtype)  # a student without any edge: the loss is the size of the teacher's graph
    parts = [float(loss(h, zero, y, edges=e)) for e in ("intra", "inter")]
    assert sum(parts) == pytest.approx(float(similarity_graph(h).square().sum()))
    assert min(parts) > 0


def test_soft_labels_of_one_class_each_are_hard_ones():
    h, y = rows(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    for edges in ("intra", "inter"):
        hard, soft = (loss(h, h + 1, t, edges=edges) for t in (y, nn.functional.one_hot(y).float()))
        assert float(hard) == pytest.approx(float(soft))


def test_mixed_labels_count_in_part():
    h = rows(2)
    y = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # half the squared distance is 0.25
    same, different = (float(loss(h, torch.zeros_like(h), y, edges=e)) for e in ("intra", "inter"))
    assert (same, different) == pytest.approx((2 * 0.75**2, 2 * 0.25**2))  # one edge of weight 1, seen twice


@pytest.mark.parametrize("y", [torch.zeros(8), torch.zeros(8, 2), torch.zeros(3, dtype=torch.int64)])
def test_edges_need_classes(y):
    with pytest.raises(DataError, match="needs classes"):
        loss(rows(), rows(), y, edges="intra")


# neighbours, and the faults seen in ports


@pytest.mark.parametrize("k", range(1, 8))
def test_the_mask_is_symmetric_and_has_k_neighbours_in_every_row(k):
    mask = neighbours(similarity_graph(rows()), k)
    assert torch.equal(mask, mask.T)
    assert (mask.sum(1) >= k).all()
    assert not mask.diagonal().any()


def test_the_mask_against_a_loop():
    graph = similarity_graph(rows(9, 4, seed=3))
    expected = torch.zeros(9, 9, dtype=graph.dtype)
    for i, row in enumerate(graph.tolist()):
        for j in sorted(range(9), key=lambda j: -row[j])[:2]:
            expected[i, j] = expected[j, i] = 1
    assert torch.equal(neighbours(graph, 2), expected)


def test_ties_go_to_the_first():
    mask = neighbours(torch.zeros(4, 4), 1)
    assert mask.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("k", [1, 3])
def test_few_neighbours_still_give_loss_and_gradient(k):
    student = rows(seed=1).requires_grad_(True)
    value = loss(rows(), student, k=k)
    value.backward()
    assert float(value.detach()) > 0
    assert torch.isfinite(student.grad).all()
    assert student.grad.any()


def test_the_mask_is_the_teachers():
    """With k = 1, edges that the teacher has not count in neither graph."""
    h, student = rows(), rows(seed=1)
    mask = neighbours(similarity_graph(h), 1)
    expected = ((similarity_graph(student) - similarity_graph(h)) * mask).square().sum()
    assert float(loss(h, student, k=1)) == pytest.approx(float(expected))


def test_k_of_the_whole_batch_keeps_everything():
    assert float(loss(rows(), rows(seed=1), k=8)) == float(loss(rows(), rows(seed=1)))


# layers


def test_mean_over_layers_and_the_last_one():
    torch.manual_seed(0)
    teacher, student = Net(8).eval(), Net(4).eval()
    x = torch.randn(7, 5)

    def value(**knobs):
        return float(GraphDistillation(teacher, **knobs).loss(student, x, None).detach())

    low, high = value(layers="low"), value(layers="high")
    assert value(layers=("low", "high")) == pytest.approx((low + high) / 2)
    assert value(layers=("low", "high"), last_only=True) == high
    assert value() == high  # what enters the head


def test_refuses_layers_that_match_nothing_or_differ_in_number():
    with pytest.raises(NoMatch, match="close: high"):
        GraphDistillation(Net(), layers=("hihg",))
    with pytest.raises(KnobError, match="equally many"):
        GraphDistillation(Net(), layers=("low", "high"), teacher_layers=("high",)).loss(Net(), torch.zeros(2, 5), None)


# where a plain port divides by zero


def test_features_below_zero_and_rows_of_zeros_stay_finite():
    signed = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = signed - signed.mean(0)
    empty = rows()
    empty[2] = 0
    for teacher in (centred, empty, -rows()):
        for h in (centred, empty, torch.zeros(8, 5, dtype=torch.float64)):
            student = h.clone().requires_grad_(True)
            value = loss(teacher, student, k=3, power=2)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(student.grad).all()
    assert float(similarity_graph(centred).max()) <= 1


def test_nan_is_not_hidden():
    broken = rows()
    broken[0, 0] = torch.nan
    assert torch.isnan(loss(rows(), broken))


def test_one_row_gives_zero():
    assert float(loss(rows(1), rows(1, seed=1))) == 0


@pytest.mark.parametrize("k", [None, 2])
def test_gradient_in_float64(k):
    student = rows(5, 3, seed=1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h: loss(rows(5, 3), h, k=k, power=2), (student,))


@pytest.mark.parametrize(
    "knobs", [{"k": 0}, {"k": 2.5}, {"power": 0}, {"power": None}, {"edges": "both"}, {"epsilon": 0.0}]
)
def test_refuses_knobs_outside_their_range(knobs):
    with pytest.raises(KnobError, match=next(iter(knobs))):
        GraphDistillation(Fixed(TEACHER), layers=OUTPUT, **knobs)
