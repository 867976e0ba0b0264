"""The objective battery: every entry of OBJECTIVES; and parts broken on purpose, on which its checks must fail."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from objective_nets import IDENTITY, OUTPUT, STUDENT, TEACHER, Fixed, Net, equal_states, hooks_of, rows, state_of
from torch import nn

from thrifty.objectives import (
    OBJECTIVES,
    CrossEntropy,
    Distillation,
    GraphDistillation,
    GraphSmoothness,
    RelationalDistillation,
    Teacher,
    WeightedSum,
    graph_distillation,
)
from thrifty.recipe import technique_name
from thrifty.task import Task

each = pytest.mark.parametrize("name", sorted(OBJECTIVES))

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
HARD = torch.arange(12) % 3
SOFT = 0.7 * nn.functional.one_hot(HARD).float() + 0.3 * nn.functional.one_hot(HARD.flip(0)).float()
LABELS = torch.tensor([0, 0, 1])
TWO = Fixed([[0.0, 2 * math.log(3.0)]])  # class probabilities 1/4 and 3/4 at temperature 2
TWO_KL = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
EVEN = torch.zeros(1, 2, dtype=torch.float64)

# name -> (objective, x, which the student passes on, y, loss); a new objective needs a line here.
BY_HAND = {
    "cross_entropy": (CrossEntropy(0.5), torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1]),
                      -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
    "distillation": (Distillation(TWO, temperature=2.0, alpha=0.5), EVEN, torch.tensor([1]),
                     0.5 * 4 * TWO_KL + 0.5 * math.log(2)),
    "graph_distillation": (GraphDistillation(Fixed(TEACHER), layers=OUTPUT, power=2), STUDENT, LABELS, 1.5),
    "relational_distillation": (RelationalDistillation(Fixed(TEACHER), layers=OUTPUT), STUDENT, LABELS, 0.0441559),
    "graph_smoothness": (GraphSmoothness(reduction="unordered"),
                         torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], dtype=torch.float64), LABELS, 0.3793023),
    "weighted_sum": (WeightedSum({GraphDistillation(Fixed(TEACHER), layers=OUTPUT): 25,
                                  GraphDistillation(Fixed(TEACHER), layers=OUTPUT, power=2): 2}),
                     STUDENT, LABELS, 25 * 2.0 + 2 * 1.5),
}  # fmt: skip


def nets():
    """A student in training, and a wider teacher that is left in training mode, with gradients."""
    torch.manual_seed(0)
    student, teacher = Net(6), Net(9)
    teacher(X).sum().backward()
    return student.train(), teacher.train()


# the checks; they return the number of cases that they ran


def check_finite(build) -> int:
    """For labels and for probabilities, loss and gradients are finite, and the gradients not all zero."""
    cases = 0
    for y in (HARD, SOFT):
        student, teacher = nets()
        modes = [m.training for m in student.modules()]
        loss = build(teacher).loss(student, X, y)
        assert loss.shape == ()
        assert torch.isfinite(loss)
        loss.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert all(torch.isfinite(g).all() for g in gradients)
        assert any(g.any() for g in gradients)
        assert modes == [m.training for m in student.modules()]
        cases += 1
    return cases


def check_teacher_untouched(build, student, teacher) -> int:
    """Three steps change no bit of the caller's teacher; and a later change of it changes no loss."""
    before = state_of(teacher)
    objective = build(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    cases = 0
    for _ in range(3):
        optimizer.zero_grad()
        objective.loss(student, X, HARD).backward()
        optimizer.step()
        assert equal_states(state_of(teacher), before)
        cases += 1
    student.eval()
    loss = float(objective.loss(student, X, HARD).detach())
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(-3)
    assert float(objective.loss(student, X, HARD).detach()) == loss
    return cases + 1


def check_no_hook_left(objective, student, teacher) -> int:
    """No hook stays on either model, also when the forward pass fails."""
    objective.loss(student, X, HARD)
    with pytest.raises(RuntimeError):
        objective.loss(student, X[:, :4], HARD)
    models = (student, teacher, *teachers_of(objective))
    assert hooks_of(*models) == 0
    return len(models)


def teachers_of(objective):
    """Return the frozen copies that an objective holds."""
    if isinstance(objective, WeightedSum):
        return [t for o, _ in objective.pairs for t in teachers_of(o)]
    return [objective.teacher] if hasattr(objective, "teacher") else []


def check_gradient(objective, student) -> int:
    """The gradient with respect to what the student shows is that of finite differences, in float64."""
    h = rows(6, 4, seed=1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda t: objective.loss(student, t, torch.arange(6) % 3), (h,))
    return h.numel()


def check_deterministic(objective) -> int:
    """Equal seeds give equal weights in Task.fit, with and without mixup, and the weights move."""
    task = Task.from_arrays(X.repeat(4, 1), HARD.repeat(4), test=0)
    cases = 0
    for mixup in (0.0, 0.4):
        trained = []
        for _ in range(2):
            torch.manual_seed(1)
            net = Net(6)
            start = copy.deepcopy(net.state_dict())
            task.fit(net, epochs=1, lr=0.01, batch=16, mixup=mixup, objective=objective)
            trained.append(net.state_dict())
        assert all(torch.equal(v, trained[1][k]) for k, v in trained[0].items())
        assert any(not torch.equal(v, start[k]) for k, v in trained[0].items())
        cases += 1
    return cases


# every objective


def test_every_objective_is_here_with_a_case_by_hand():
    assert set(BY_HAND) == set(OBJECTIVES)
    assert len(OBJECTIVES) >= 6


@each
def test_finite_loss_and_gradient_for_labels_and_for_probabilities(name):
    assert check_finite(OBJECTIVES[name].example) == 2


@each
def test_teacher_untouched(name):
    assert check_teacher_untouched(OBJECTIVES[name].example, *nets()) == 4


@each
def test_by_hand(name):
    objective, x, y, expected = BY_HAND[name]
    assert type(objective) is OBJECTIVES[name]
    assert float(objective.loss(IDENTITY, x, y)) == pytest.approx(expected, abs=1e-7)


@each
def test_gradient_in_float64(name):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Identity(), nn.Linear(4, 3)).double()
    teacher = nn.Sequential(Fixed(rows(6, 5)), nn.Linear(5, 3)).double()
    assert check_gradient(OBJECTIVES[name].example(teacher), student) == 24


@each
def test_no_hook_left_behind(name):
    student, teacher = nets()
    taught = name not in ("cross_entropy", "graph_smoothness")
    assert check_no_hook_left(OBJECTIVES[name].example(teacher), student, teacher) == 2 + taught


@each
def test_trains_in_a_task(name):
    assert check_deterministic(OBJECTIVES[name].example(nets()[1])) == 2


@each
def test_is_a_printable_value(name):
    objective = OBJECTIVES[name].example(Teacher(Net(9)))
    assert technique_name(objective) == name
    assert len({objective, copy.copy(objective)}) == 1
    assert "Linear" not in repr(objective)
    with pytest.raises(AttributeError):
        objective.anything = 1


# broken on purpose


@dataclass(frozen=True)
class Broken:
    """A distillation with one fault."""

    teacher: nn.Module
    fault: str

    def loss(self, model, x, y):
        kept = []
        handle = model.high.register_forward_hook(lambda _m, _a, out: kept.append(out))
        out = model(x)
        if self.fault != "hooks":
            handle.remove()
        goal = self.teacher(x) if self.fault == "alive" else self.teacher(x).detach()
        if self.fault == "no_grad":
            with torch.no_grad():
                out = out * 1.0
        if self.fault == "empty":
            return (out * 0).sum()
        return torch.sqrt((out - out).abs()).sum() if self.fault == "nan" else (out - goal).square().sum()


@pytest.mark.parametrize("fault", ["no_grad", "empty", "nan"])
def test_no_gradient_is_noticed(fault):
    with pytest.raises((AssertionError, RuntimeError)):
        check_finite(lambda teacher: Broken(teacher, fault))


def test_a_mask_that_is_never_filled_is_noticed(monkeypatch):
    """A fault seen in a port of graph distillation."""
    monkeypatch.setattr(graph_distillation, "neighbours", lambda graph, k: torch.zeros_like(graph))
    with pytest.raises(AssertionError):
        check_finite(OBJECTIVES["graph_distillation"].example)


def test_a_student_without_gradient_is_noticed(monkeypatch):
    """Another one: the whole loss inside torch.no_grad."""
    monkeypatch.setattr(GraphDistillation, "value", torch.no_grad()(GraphDistillation.value))
    with pytest.raises((AssertionError, RuntimeError)):
        check_finite(OBJECTIVES["graph_distillation"].example)


def test_a_teacher_that_learns_is_noticed():
    with pytest.raises(AssertionError):
        check_teacher_untouched(lambda t: Broken(t, "alive"), *nets())


def test_a_hook_left_behind_is_noticed():
    student, teacher = nets()
    with pytest.raises(AssertionError):
        check_no_hook_left(Broken(teacher, "hooks"), student, teacher)


def test_a_wrong_gradient_is_noticed():
    @dataclass(frozen=True)
    class Half:
        def loss(self, model, x, y):
            out = model(x)
            return (out.detach() * out).sum()

    with pytest.raises((AssertionError, RuntimeError)):
        check_gradient(Half(), nn.Linear(4, 3).double())
