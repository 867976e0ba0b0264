from __future__ import annotations

import pytest
import torch
from objective_nets import Fixed, Net, equal_states, hooks_of, state_of
from small import small_task, trained
from torch import nn

from thrifty.compress import Quantize
from thrifty.errors import Incompatible, NoMatch
from thrifty.objectives import GraphDistillation, Teacher
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


def test_a_quantised_model_shows_its_output_only():
    task, net = small_task(), trained()
    quantised = Quantize(calibration_samples=32).edit(net, task)
    with pytest.raises(Incompatible, match="QuantizedModel"):
        GraphDistillation(net).loss(quantised, task.train.x[:8], task.train.y[:8])
    value = GraphDistillation(net, layers=("",)).loss(quantised.train(), task.train.x[:8], task.train.y[:8])
    assert torch.isfinite(value)
    assert value.requires_grad


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
