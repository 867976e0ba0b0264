from __future__ import annotations

import copy

import pytest
import torch
from objective_nets import Fixed, Net, equal_states, hooks_of, state_of
from small import small_task, trained
from torch import nn

from thrifty.compress import Quantize
from thrifty.errors import Incompatible, NoMatch
from thrifty.objectives import GraphDistillation, GraphSmoothness, RelationalDistillation, Teacher
from thrifty.objectives.features import find, look

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


# places


def test_places_follow_the_patterns_and_then_the_modules():
    assert find(Net(), ("high", "low")) == ("high", "low")
    assert find(Net(), ("low.*", "head:input", "")) == ("low.0", "low.1", "head:input", "")
    assert find(Net(), ("low.0", "low.*")) == ("low.0", "low.1")
    assert "" not in find(Net(), ("*",))
    assert find(Net(), ()) == ("head:input",)
    assert find(Teacher(Net()), ("low",)) == ("low",)


def test_every_pattern_must_match():
    with pytest.raises(NoMatch, match=r"'lo' matches no module of Net, close: low; 'x\.\*'"):
        find(Net(), ("lo", "high", "x.*"))
    with pytest.raises(NoMatch, match=r"no nn\.Linear"):
        find(nn.ReLU(), ())


# looking


def test_features_are_what_the_modules_gave():
    net = Net().eval()
    seen = look(net, X, ("low", "head:input", ""))
    torch.testing.assert_close(seen.at["low"], net.low(X))
    torch.testing.assert_close(seen.at["head:input"], net.high(net.low(X)))
    assert seen.at[""] is seen.output
    assert seen.at["low"].requires_grad


def test_no_hook_stays_even_after_an_error():
    net = Net()
    look(net, X, ("low", "head:input"))
    with pytest.raises(RuntimeError):
        look(net, torch.zeros(4, 6), ("low", "head:input"))
    assert hooks_of(net) == 0


class Odd(nn.Module):
    """Modules that cannot be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.twice = nn.Linear(5, 5), nn.Linear(5, 5)
        self.pair, self.folded = nn.LSTM(5, 5, batch_first=True), nn.Flatten(0)
        self.norm, self.inplace = nn.BatchNorm1d(5), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.twice(self.twice(x))
        x = self.pair(x[:, None])[0][:, 0]
        x = self.folded(x).reshape(-1, 5)
        return self.inplace(self.norm(x))


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("unused", "did not run"),
        ("twice", "ran 2 times"),
        ("pair", "gives tuple"),
        ("folded", r"gives \(20,\)"),
        ("norm", "changed in place"),
        ("inplace:input", "changed in place"),
    ],
)
def test_refuses_a_place_that_cannot_be_used(place, why):
    net = Odd()
    with pytest.raises(Incompatible, match=why):
        look(net, X, (place,))
    assert hooks_of(net) == 0
    assert look(net, X, ("inplace",)).at["inplace"].shape == (4, 5)


def test_refuses_a_model_that_returns_several():
    with pytest.raises(Incompatible, match="returns tuple"):
        look(nn.LSTM(5, 3), X, ())


# quantised models, which run a graph instead of their modules


class Moved(nn.Module):
    """Operators that a graph folds (norm), moves (the ReLU behind the pool), merges (pad) and leaves out (drop)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.pad, self.last = nn.ZeroPad2d(1), nn.Conv2d(6, 5, 3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.relu(self.pool(self.norm(self.conv(x))))
        return self.head(self.drop(torch.relu(self.last(self.pad(x))).mean((2, 3))))


@pytest.fixture(scope="module")
def pair():
    """A float model, and the same in integers of 16 bits."""
    task = small_task()
    torch.manual_seed(0)
    net = Moved()
    task.fit(net, epochs=2, lr=0.05, batch=16)
    return net, Quantize(bits=16, bias_correction=False, calibration_samples=64).edit(net, task), task.train.x[:32]


PLACES = ("norm", "relu", "last", "drop", "head:input", "head")


def no_grad_look(net, x):
    with torch.no_grad():
        return look(net.eval(), x, PLACES)


def apart(seen, expected, place):
    """Return the largest difference at a place, as a share of the largest value."""
    found = seen.at[place].detach()
    return float((found - expected.at[place]).abs().max() / expected.at[place].abs().max())


@pytest.mark.parametrize("mode", ["soft", "last part of training", "exact"])
def test_a_quantised_model_shows_what_the_modules_would(pair, mode):
    net, quantised, x = pair
    quantised.train(mode != "exact").training_hard = mode == "last part of training"
    try:
        seen, expected = look(quantised, x, (*PLACES, "")), no_grad_look(net, x)
    finally:
        quantised.train(False).training_hard = False
    assert all(seen.at[p].shape == expected.at[p].shape for p in PLACES)
    if mode == "exact":  # the integers of a layer are those behind the activation that is fused into it
        expected.at["norm"].clamp_(min=0), expected.at["last"].clamp_(min=0)
    assert max(apart(seen, expected, p) for p in PLACES) < 2e-3
    assert all(seen.at[p].requires_grad == (mode != "exact") for p in PLACES)
    assert seen.at[""] is seen.output


def test_coarser_integers_show_coarser_features(pair):
    net, quantised, x = pair
    coarse = Quantize(bits=4, calibration_samples=64).edit(net, small_task())
    expected = no_grad_look(net, x)
    errors = [apart(look(q, x, ("relu",)), expected, "relu") for q in (quantised, coarse)]
    assert errors[0] < 1e-3 < errors[1] < 1


def test_the_names_are_those_of_the_float_model(pair):
    net, quantised, _ = pair
    for patterns in ((), ("*",), ("re*", "head:input", "")):
        assert find(quantised, patterns) == find(net, patterns)
    assert find(Teacher(quantised), ("last",)) == ("last",)


def test_a_place_without_an_operator_is_refused(pair):
    _, quantised, x = pair
    with pytest.raises(Incompatible, match=r"'pad'.*merged.*beside it"):
        look(quantised, x, ("pad",))
    with pytest.raises(RuntimeError):
        look(quantised, x[:, :, :, :1], ("relu",))
    assert quantised._watched is None
    assert hooks_of(quantised) == 0


@pytest.mark.parametrize("kind", [GraphDistillation, RelationalDistillation])
def test_geometry_of_a_quantised_model(pair, kind):
    """Loss as on the float model up to rounding; finite gradients, not all zero, also of the exact integers."""
    net, quantised, x = pair
    teacher = Teacher(copy.deepcopy(net))
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    objective = kind(teacher, layers=("relu", "head:input"))
    expected = float(objective.loss(net.eval(), x, None).detach())
    quantised.train()
    for hard in (False, True):
        quantised.training_hard = hard
        loss = objective.loss(quantised, x, None)
        quantised.zero_grad()
        loss.backward()
        grads = {n: p.grad for n, p in quantised.named_parameters() if p.grad is not None}
        assert float(loss.detach()) == pytest.approx(expected, rel=0.02)
        assert all(torch.isfinite(g).all() for g in grads.values())
        assert grads["model.conv.parametrizations.weight.original"].any()
    quantised.train(False).training_hard = False


def test_smoothness_of_a_hidden_layer_of_a_quantised_model(pair):
    net, quantised, x = pair
    y = torch.arange(len(x)) % 4
    objective = GraphSmoothness(layer="relu", alpha=0.1)
    loss = objective.loss(quantised.train(), x, y)
    assert float(loss.detach()) == pytest.approx(float(objective.loss(net.eval(), x, y).detach()), rel=0.01)
    loss.backward()
    quantised.eval()


def test_a_quantised_teacher_shows_its_features(pair):
    net, quantised, x = pair
    teacher = Teacher(quantised)
    assert apart(look(teacher, x, PLACES), no_grad_look(net, x), "relu") < 2e-3
    loss = GraphDistillation(teacher, layers=("relu",)).loss(net, x, None)
    assert float(loss.detach()) < 1e-4


# teachers


def test_a_teacher_is_a_frozen_copy():
    net = Net().train()
    before = state_of(net)
    teacher = Teacher(net)
    first = teacher(X)
    assert equal_states(state_of(net), before)
    assert not first.requires_grad
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(teacher(X), first)
    assert Teacher.of(teacher) is teacher


def test_a_teacher_stays_in_eval_mode():
    teacher = Teacher(Net())
    teacher.train()
    teacher.model.train()
    assert torch.equal(teacher(X), teacher(X))
    assert int(teacher.model.high[1].num_batches_tracked) == 0


def test_a_quantised_teacher():
    task, net = small_task(), trained()
    teacher = Teacher(Quantize(calibration_samples=32).edit(net, task))
    assert torch.equal(teacher(task.example), teacher.model(task.example))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_model_may_be_its_own_teacher():
    net = Net().eval()
    assert float(GraphDistillation(net).loss(net, X, None).detach()) == 0
    assert float(GraphDistillation(Fixed(X), layers=("",), k=1).loss(Fixed(X), X, None)) == 0
