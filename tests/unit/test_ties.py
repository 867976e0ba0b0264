"""ties: the groups of channels, operator by operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thrifty.capture import capture
from thrifty.errors import UnsupportedModel
from thrifty.ties import Group, Member, channel_groups

X = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def groups_of(function, x=X, **parts) -> dict[str, Group]:
    return {g.name: g for g in channel_groups(capture(Net(function, **parts), x))}


def member(group: Group, tensor: str, axis: int) -> Member:
    return next(m for m in group.members if (m.tensor, m.axis) == (tensor, axis))


def head(**parts) -> dict[str, nn.Module]:
    return {"out": nn.Linear(4, 2), **parts}


def finish(s, x):
    return s.out(x.mean((2, 3)))


def test_a_chain():
    parts = {"a": nn.Conv2d(3, 8, 3), "n": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 4, 3), "out": nn.Linear(4, 2)}
    groups = groups_of(lambda s, x: finish(s, F.relu(s.b(F.relu(s.n(s.a(x)))))), **parts)
    assert {n: g.size for n, g in groups.items()} == {"a": 8, "b": 4, "out": 2}
    assert {(m.tensor, m.axis, m.role) for m in groups["a"].members} == {
        ("a.weight", 0, "out"), ("a.bias", 0, "bias"), ("b.weight", 1, "in"),
        ("n.weight", 0, "norm"), ("n.bias", 0, "norm"),
        ("n.running_mean", 0, "norm"), ("n.running_var", 0, "norm"),
    }  # fmt: skip
    assert groups["a"].prunable
    assert groups["a"].modules == ("a",)
    assert "output" in groups["out"].frozen


def test_a_sum_ties_its_producers_and_all_readers():
    parts = head(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1))

    def function(s, x):
        x = s.a(x)
        return finish(s, F.relu(x + s.b(x)))

    groups = groups_of(function, **parts)
    assert groups["a"].modules == ("a", "b")
    readers = {m.tensor for m in groups["a"].members if m.role == "in"}
    assert readers == {"b.weight", "out.weight"}


def test_a_sum_with_the_input_is_frozen():
    groups = groups_of(lambda s, x: finish(s, s.b(x + s.a(x))), **head(a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 4, 1)))
    assert "input" in groups["a"].frozen
    assert groups["b"].prunable


def test_depthwise_goes_with_its_input():
    parts = head(a=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 8, 3, groups=4), b=nn.Conv2d(8, 4, 1))
    groups = groups_of(lambda s, x: finish(s, s.b(s.d(s.a(x)))), **parts)
    group = groups["a"]
    assert group.size == 4
    assert group.modules == ("a", "d")
    assert member(group, "d.weight", 0).units == (0, 0, 1, 1, 2, 2, 3, 3)
    assert member(group, "b.weight", 1).units == (0, 0, 1, 1, 2, 2, 3, 3)
    assert member(group, "d.weight", 0).kept([1, 3]).tolist() == [2, 3, 6, 7]


def test_grouped_conv_loses_the_same_channels_in_each_group():
    parts = head(a=nn.Conv2d(3, 8, 1), g=nn.Conv2d(8, 12, 3, groups=2), b=nn.Conv2d(12, 4, 1))
    groups = groups_of(lambda s, x: finish(s, s.b(s.g(s.a(x)))), **parts)
    assert groups["a"].size == 4
    assert member(groups["a"], "a.weight", 0).units == (0, 1, 2, 3) * 2
    assert member(groups["a"], "g.weight", 1).units == (0, 1, 2, 3)
    assert groups["g"].size == 6
    assert groups["g"].width(0) == 2


def test_concat_has_offsets():
    parts = head(a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 5, 1), c=nn.Conv2d(7, 4, 1))
    groups = groups_of(lambda s, x: finish(s, s.c(torch.cat([s.a(x), s.b(x)], 1))), **parts)
    assert groups["a"].size == 2
    assert member(groups["a"], "c.weight", 1).units == (0, 1, -1, -1, -1, -1, -1)
    assert member(groups["b"], "c.weight", 1).units == (-1, -1, 0, 1, 2, 3, 4)
    assert member(groups["b"], "c.weight", 1).kept([0, 4]).tolist() == [0, 1, 2, 6]


def test_a_sum_of_a_concat_has_a_cell_per_branch():
    parts = {
        "a": nn.Conv2d(3, 2, 1),
        "b": nn.Conv2d(3, 5, 1),
        "c": nn.Conv2d(3, 7, 1),
        "out": nn.Linear(7, 2),
    }
    groups = groups_of(lambda s, x: finish(s, torch.cat([s.a(x), s.b(x)], 1) + s.c(x)), **parts)
    assert groups["a"].modules == ("a", "b", "c")
    assert sorted(len(c) for c in groups["a"].cells) == [2, 5]


def test_concat_with_the_input_freezes_only_the_input():
    parts = head(a=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(7), b=nn.Conv2d(7, 4, 1))
    groups = groups_of(lambda s, x: finish(s, s.b(s.n(torch.cat([x, s.a(x)], 1)))), **parts)
    assert groups["a"].prunable
    assert member(groups["a"], "n.weight", 0).units == (-1, -1, -1, 0, 1, 2, 3)


def test_flatten_expands_channels():
    parts = {"a": nn.Conv2d(3, 4, 7), "out": nn.Linear(16, 2)}
    groups = groups_of(lambda s, x: s.out(s.a(x).flatten(1)), **parts)
    assert member(groups["a"], "out.weight", 1).units == (0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4


def test_flatten_after_permute_is_followed():
    parts = {"a": nn.Conv2d(3, 4, 7), "out": nn.Linear(16, 2)}
    groups = groups_of(lambda s, x: s.out(s.a(x).permute(0, 2, 3, 1).flatten(1)), **parts)
    assert member(groups["a"], "out.weight", 1).units == (0, 1, 2, 3) * 4


def test_channels_read_along_another_axis_are_frozen():
    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(8, 5, 1), "out": nn.Linear(5, 2)}
    groups = groups_of(lambda s, x: finish(s, s.b(s.a(x).permute(0, 2, 3, 1))), **parts)
    assert "another axis" in groups["a"].frozen
    assert groups["b"].prunable


def test_a_shared_module_ties_both_calls():
    parts = head(a=nn.Conv2d(3, 4, 1), s=nn.Conv2d(4, 4, 3, padding=1))
    groups = groups_of(lambda s, x: finish(s, s.s(F.relu(s.s(s.a(x))))), **parts)
    assert groups["a"].modules == ("a", "s")
    assert {m.axis for m in groups["a"].members if m.tensor == "s.weight"} == {0, 1}


def test_softmax_and_constants_in_the_code_freeze():
    parts = head(a=nn.Conv2d(3, 4, 1))
    assert "softmax" in groups_of(lambda s, x: finish(s, s.a(x).softmax(1)), **parts)["a"].frozen
    shift = torch.arange(4.0).reshape(1, 4, 1, 1)
    assert "constants" in groups_of(lambda s, x: finish(s, s.a(x) + shift), **parts)["a"].frozen
    assert groups_of(lambda s, x: finish(s, s.a(x) * 2.0), **parts)["a"].prunable


def test_computed_weights_freeze():
    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 8, 1), "out": nn.Linear(4, 2)}
    groups = groups_of(lambda s, x: finish(s, F.conv2d(s.a(x), s.b.weight[:4])), **parts)
    assert "computed" in groups["a"].frozen


def test_operators_without_a_rule_are_all_listed():
    parts = head(a=nn.Conv2d(3, 4, 1), act=nn.Sigmoid())
    with pytest.raises(UnsupportedModel) as caught:
        groups_of(lambda s, x: finish(s, torch.erf(s.act(s.a(x)))), **parts)
    assert len(caught.value.refusals) == 2
    assert "'act'" in caught.value.refusals[0]


def test_every_position_belongs_to_a_unit_once():
    parts = head(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1, groups=2))
    for group in groups_of(lambda s, x: finish(s, F.relu(s.b(s.a(x)))), **parts).values():
        for m in group.members:
            assert set(np.unique(m.units)) <= set(range(-1, group.size))
        assert sorted(u for cell in group.cells for u in cell) == list(range(group.size))
