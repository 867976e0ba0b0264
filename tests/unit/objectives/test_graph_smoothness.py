from __future__ import annotations

import math

import pytest
import torch
from objective_nets import IDENTITY, Net, rotation, rows
from small import SmallNet, small_task
from torch import nn

from thrifty.capture import capture
from thrifty.deploy.lower import lower
from thrifty.errors import DataError, KnobError
from thrifty.objectives import GraphSmoothness, k_nearest, nearest_mean
from thrifty.task import Task

POINTS = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1])


def loss(h, y, **knobs):
    return GraphSmoothness(**knobs).loss(IDENTITY, h, y)


# by hand


def test_by_hand():
    assert float(loss(POINTS, LABELS, reduction="unordered")) == pytest.approx(0.3793023, abs=5e-8)
    assert float(loss(POINTS, LABELS, reduction="ordered")) == pytest.approx(0.7586047, abs=1e-7)
    assert float(loss(POINTS, LABELS)) == pytest.approx(0.3793023 / 2, abs=5e-8)


def test_gradient_by_hand():
    h = POINTS.clone().requires_grad_(True)
    loss(h, LABELS, reduction="unordered").backward()
    assert h.grad[2].tolist() == pytest.approx([-0.36277097, 0.01021694], abs=5e-9)


def test_squared_by_hand():
    expected = math.exp(-0.5) + math.exp(-0.5 * 20)
    assert float(loss(POINTS, LABELS, alpha=0.5, reduction="unordered", squared=True)) == pytest.approx(expected)


@pytest.mark.parametrize("soft", [False, True])
def test_ordered_is_the_trace_of_the_laplacian(soft):
    h = rows()
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    signal = nn.functional.one_hot(y).double()
    if soft:
        signal = 0.7 * signal + 0.3 * signal[torch.arange(7, -1, -1)]
    weights = GraphSmoothness().similarities(h)
    trace = torch.trace(signal.T @ (torch.diag(weights.sum(1)) - weights) @ signal)
    assert float(loss(h, signal if soft else y, reduction="ordered")) == pytest.approx(float(trace))


# invariances


def test_invariances():
    h, y = rows(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    value = float(loss(h, y))
    assert float(loss(h @ rotation(5) + 3, y)) == pytest.approx(value)
    assert float(loss(2 * h, y)) < value < float(loss(0.5 * h, y))
    assert float(loss(h, torch.tensor([2, 0, 1])[y])) == pytest.approx(value)
    assert float(loss(h, torch.zeros(8, dtype=torch.int64))) == 0
    assert float(loss(2 * h, y, unit_norm=True)) == pytest.approx(float(loss(h, y, unit_norm=True)))


def test_moves_within_a_class_change_nothing():
    """The second point turns around the only one of the other class."""
    y, turned = torch.tensor([0, 0, 1]), POINTS.clone()
    turned[1] = POINTS[2] + torch.tensor([20.0**0.5, 0.0], dtype=torch.float64)
    assert float(loss(turned, y)) == pytest.approx(float(loss(POINTS, y)))


def test_only_neighbours_count():
    y = torch.tensor([0, 0, 1])  # nearest: 0 and 2 of each other; 2 of 1, and so the pair of 1 and 2 stays
    assert float(loss(POINTS, y, k=1, reduction="unordered")) == pytest.approx(0.3793023, abs=5e-8)
    y = torch.tensor([0, 1, 0])  # 0-1 is dropped
    expected = math.exp(-math.sqrt(20))
    assert float(loss(POINTS, y, k=1, reduction="unordered")) == pytest.approx(expected)


def test_gradient_at_equal_points_is_finite():
    h = torch.zeros(4, 3, requires_grad=True)
    for knobs in ({}, {"unit_norm": True}, {"squared": True}):
        loss(h, torch.tensor([0, 1, 0, 1]), **knobs).backward()
        assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("knobs", [{}, {"k": 2}, {"squared": True}, {"unit_norm": True, "reduction": "ordered"}])
def test_gradient_in_float64(knobs):
    h = rows(6, 3, seed=1).requires_grad_(True)
    y = torch.tensor([0, 1, 2, 0, 1, 0])
    assert torch.autograd.gradcheck(lambda t: loss(t, y, **knobs), (h,))


def test_free_points_separate_and_do_not_collapse():
    y = torch.arange(12) % 3
    start = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = start.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([h], lr=5.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss(h, y).backward()
        optimizer.step()
    different = y[:, None] != y[None, :]
    before, after = (torch.cdist(t, t) for t in (start, h.detach()))
    assert float(after[different].min()) > 4 * float(before[different].min())
    assert float(after[~different].mean()) > float(before[~different].mean())
    assert float(loss(h.detach(), y)) < 0.2 * float(loss(start, y))


def test_an_inner_layer():
    torch.manual_seed(0)
    net, x, y = Net().eval(), torch.randn(6, 5), torch.arange(6) % 3
    at_layer = GraphSmoothness(layer="high").loss(net, x, y)
    assert float(at_layer.detach()) == float(loss(net.high(net.low(x)), y).detach())
    with pytest.raises(KnobError, match="name one"):
        GraphSmoothness(layer="high.*").loss(net, x, y)


def test_needs_classes():
    with pytest.raises(DataError, match="needs classes"):
        loss(POINTS, torch.zeros(3))


@pytest.mark.parametrize("knobs", [{"alpha": 0}, {"k": 0}, {"reduction": "sum"}])
def test_refuses_knobs_outside_their_range(knobs):
    with pytest.raises(KnobError, match=next(iter(knobs))):
        GraphSmoothness(**knobs)


# classifiers


@pytest.fixture(scope="module")
def learnt():
    """A network trained on smoothness alone: its outputs are no scores."""
    torch.manual_seed(0)
    task = small_task()
    net = SmallNet()
    task.fit(net, epochs=15, lr=0.1, objective=GraphSmoothness(unit_norm=True))
    return net, task


def test_a_trained_network_classifies_by_means_and_by_neighbours(learnt):
    net, task = learnt
    before = {k: v.clone() for k, v in net.state_dict().items()}
    means, votes = nearest_mean(net, task, unit_norm=True), k_nearest(net, task, k=5, unit_norm=True)
    assert task.score(means) > 0.9
    assert task.score(votes) > 0.9
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("unit_norm", [False, True])
def test_nearest_mean_against_distances(learnt, unit_norm):
    net, task = learnt
    outputs, queries = (torch.from_numpy(task.outputs(net, s)) for s in ("train", "validation"))
    if unit_norm:
        outputs, queries = (nn.functional.normalize(t) for t in (outputs, queries))
    means = torch.stack([outputs[task.train.y == c].mean(0) for c in range(4)])
    expected = torch.cdist(queries, nn.functional.normalize(means) if unit_norm else means).argmin(1)
    found = task.outputs(nearest_mean(net, task, unit_norm))
    assert found.argmax(1).tolist() == expected.tolist()


def test_nearest_mean_deploys(learnt):
    net, task = learnt
    assert lower(capture(nearest_mean(net, task), task.example)).calls[-1].op == "linear"


def test_k_nearest_by_hand():
    task = Task.from_arrays([[0.0], [1.0], [10.0]], [0, 0, 1], x_validation=[[2.0], [9.0]], y_validation=[0, 1], test=0)
    votes = k_nearest(IDENTITY, task, k=2)
    torch.testing.assert_close(votes(torch.tensor([[2.0], [9.0]])), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    with pytest.raises(KnobError, match=r"1\.\.3"):
        k_nearest(IDENTITY, task, k=4)


def test_classifiers_refuse_what_has_no_mean():
    numbers = Task.from_arrays([[0.0], [1.0]] * 10, [0.5, 1.5] * 10)
    with pytest.raises(DataError, match="no classes"):
        nearest_mean(IDENTITY, numbers)
    empty = Task.from_arrays([[0.0], [1.0]] * 10, [0, 1] * 10, classes=("a", "b", "c"))
    with pytest.raises(DataError, match="no training rows of class c"):
        nearest_mean(IDENTITY, empty)
