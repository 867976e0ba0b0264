"""Prune and cut: real shapes; masked equals cut; refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import Random, shake
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from thrifty.capture import capture
from thrifty.compress.prune import IMPORTANCES, Prune, cut, recalibrate
from thrifty.cost import count
from thrifty.errors import Incompatible, KnobError, NoMatch, NothingToDo
from thrifty.task import Task
from thrifty.ties import channel_groups


def a_task(*shape: int, n: int = 96, classes: int = 2) -> Task:
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, *shape)).astype(np.float32) + y.reshape(-1, *[1] * len(shape)) * 0.7
    return Task.from_arrays(x, y, name="blobs")


TASK = a_task(3, 8, 8)


class Block(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(c, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.bn = nn.Conv2d(12, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(x + self.bn(self.b(F.relu(self.an(self.a(x))))))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    depth = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.Conv2d(16, 24, 1), nn.ReLU())
    model = nn.Sequential(stem, Block(16), depth, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
    return shake(model)


def masked(model: nn.Module, graph, kept) -> nn.Module:
    """Zero everything that makes the channels that are not kept."""
    twin = copy.deepcopy(model)
    for group in channel_groups(graph):
        if group.name in kept:
            for m in group.members:
                if m.role != "in" and not m.tensor.endswith("running_var"):
                    path, _, attribute = m.tensor.rpartition(".")
                    gone = np.setdiff1d(np.arange(len(m.units)), m.kept(kept[group.name]))
                    getattr(twin.get_submodule(path), attribute).data[gone] = 0
    return twin


# --- random nets ---


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    letters=st.text("crsdmgpk", min_size=1, max_size=4).filter(lambda t: t.count("p") < 3),
    width=st.sampled_from([4, 6, 8]),
    one_d=st.booleans(),
    flat=st.booleans(),
    seed=st.integers(0, 9),
)
def test_masked_equals_cut(letters, width, one_d, flat, seed):
    torch.manual_seed(seed)
    model = shake(Random(letters, width, one_d, flat))
    x = torch.randn(3, 3, 8) if one_d else torch.randn(3, 3, 8, 8)
    graph = capture(model, x)
    rng = np.random.default_rng(seed)
    kept = {
        g.name: sorted(u for c in g.cells for u in rng.permutation(c)[: rng.integers(1, len(c) + 1)].tolist())
        for g in channel_groups(graph)
        if g.prunable
    }
    assert kept
    smaller = cut(model, graph, kept)
    assert torch.allclose(smaller(x), masked(model, graph, kept)(x), atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) <= sum(p.numel() for p in model.parameters())


# --- the technique ---


def test_edit_shrinks_and_leaves_the_caller_alone():
    model = small()
    before = copy.deepcopy(model.state_dict())
    edited = Prune(ratio=0.5, recover_epochs=1).edit(model, TASK)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    a, b = (count(capture(m, TASK.example)) for m in (model, edited))
    assert b.macs < 0.4 * a.macs
    assert b.params < 0.4 * a.params
    assert [m.out_channels for m in edited.modules() if isinstance(m, nn.Conv2d)] == [8, 8, 8, 8, 12]
    depthwise = edited[2][0]
    assert (depthwise.groups, depthwise.in_channels) == (8, 8)
    assert edited[0][1].num_features == 8
    assert edited[5].in_features == 12
    assert edited(TASK.validation.x).shape == (len(TASK.validation.x), 2)


def test_equal_seed_equal_weights():
    a, b = (Prune(recover_epochs=1).edit(small(), TASK) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_stages_are_named():
    names = [n for n, _ in Prune(recover_epochs=1).stages(small(), TASK)]
    assert names == ["cut", "recalibrated", "recovered"]
    assert [n for n, _ in Prune(recover_epochs=0, recalibrate=False).stages(small(), TASK)] == ["cut"]


def test_the_smallest_filters_go():
    model = small()
    conv = model[2][1]
    with torch.no_grad():
        conv.weight[[1, 3, 5, 20]] *= 0.01
    kept = Prune(ratio=4 / 24, keep=("0.*", "1.*")).choose(model, capture(model, TASK.example), TASK)
    assert list(kept) == ["2.1"]
    assert sorted(set(range(24)) - set(kept["2.1"])) == [1, 3, 5, 20]


def test_global_scope_ranks_across_groups():
    model = small()
    with torch.no_grad():
        model[2][1].weight[:16] *= 1e-3  # most of one group is nearly zero
    graph = capture(model, TASK.example)
    kept = Prune(ratio=0.25, scope="global").choose(model, graph, TASK)
    assert list(kept) == ["2.1"]  # 13 of 52 units go, all of them here; 11 would stay, rounded 12
    assert len(kept["2.1"]) == 12
    assert set(range(16, 24)) <= set(kept["2.1"])


@pytest.mark.parametrize("importance", ["l1", "taylor", "random"])
def test_importances_run(importance):
    edited = Prune(ratio=0.5, importance=importance, recover_epochs=0).edit(small(), TASK)
    assert edited[2][1].out_channels == 12


def test_bn_importance_reads_the_scales():
    model = small()
    with torch.no_grad():
        model[1].an.weight[[0, 2, 4, 6]] = 1e-3
    plan = Prune(ratio=1 / 3, importance="bn", keep=("0", "2", "1.b"))
    kept = plan.choose(model, capture(model, TASK.example), TASK)
    assert kept == {"1.a": (1, 3, 5, 7, 8, 9, 10, 11)}
    with pytest.raises(Incompatible, match=r"none behind 2\.1"):
        Prune(importance="bn").edit(model, TASK)


def test_taylor_finds_what_the_loss_does_not_need():
    model = small()
    with torch.no_grad():
        model[5].weight[:, :12] = 0  # the loss does not see these channels
    groups = [g for g in channel_groups(capture(model, TASK.example)) if g.name == "2.1"]
    scores = IMPORTANCES["taylor"](model, groups, TASK)["2.1"]
    assert not scores[:12].any()
    assert scores[12:].any()
    assert all(p.grad is None for p in model.parameters())


def test_ratios_and_keep():
    edited = Prune(ratio=0, ratios={"1.a": 0.67}, recover_epochs=0).edit(small(), TASK)
    assert [m.out_channels for m in edited.modules() if isinstance(m, nn.Conv2d)] == [16, 4, 16, 16, 24]
    edited = Prune(ratio=0.5, keep=("1",), recover_epochs=0).edit(small(), TASK)
    assert [m.out_channels for m in edited.modules() if isinstance(m, nn.Conv2d)] == [16, 12, 16, 16, 12]


def test_counts_are_multiples_in_every_branch():
    torch.manual_seed(0)
    plan = Prune(ratio=0.4, round_to=4, recover_epochs=0, min_channels=1)
    edited = plan.edit(Random("sg", 8, False, False), TASK)
    for m in edited.modules():
        if isinstance(m, nn.Conv2d):
            assert m.out_channels % 4 == 0


def test_min_channels_and_rounding():
    edited = Prune(ratio=0.99, min_channels=6, round_to=1, recover_epochs=0).edit(small(), TASK)
    assert {m.out_channels for m in edited.modules() if isinstance(m, nn.Conv2d)} == {6}


def test_recalibration_helps_and_reports():
    model = small()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean += 3
    x = TASK.train.x
    before = model[0][1](model[0][0](x)).mean()
    assert recalibrate(model, TASK, batch=8)
    after = model[0][1](model[0][0](x)).mean()
    assert abs(after - model[0][1].bias.mean()) < 0.05 < abs(before - model[0][1].bias.mean())
    assert model[0][1].momentum == 0.1
    assert not model.training
    assert not recalibrate(nn.Linear(3, 2), TASK)


def test_shared_parameters_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s, self.t = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.t.weight = self.s.weight
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            return self.out(F.relu(self.t(F.relu(self.s(self.a(x))))).mean((2, 3)))

    edited = Prune(recover_epochs=0).edit(Tied(), TASK)
    assert edited.t.weight is edited.s.weight
    assert edited.t.out_channels == edited.s.in_channels == 4
    assert edited.t.bias.shape == (4,)


# --- refusals ---


@pytest.mark.parametrize(
    "knobs",
    [
        *({"ratio": 1.0}, {"ratio": -0.1}, {"importance": "l2"}, {"scope": "all"}, {"ratios": {"a": 1}}),
        *({"round_to": 0}, {"min_channels": 0}, {"recover_epochs": -1}, {"recover_lr": 0.0}),
    ],
)
def test_knobs_are_checked(knobs):
    with pytest.raises(KnobError, match=next(iter(knobs))):
        Prune(**knobs)


def test_all_bad_knobs_at_once_and_json():
    with pytest.raises(KnobError, match=r"ratio.*importance.*scope"):
        Prune(ratio=2, importance="x", scope="y")
    plan = Prune(ratios={"a": 0.25}, keep=("b",))
    assert json.loads(json.dumps(asdict(plan)))["ratios"] == {"a": 0.25}
    assert set(IMPORTANCES) == {"l1", "bn", "taylor", "random"}


def test_patterns_must_match():
    with pytest.raises(NoMatch, match=r"1\.a"):
        Prune(keep=("1.aa",)).edit(small(), TASK)
    with pytest.raises(NoMatch):
        Prune(ratios={"head": 0.5}).edit(small(), TASK)
    with pytest.raises(Incompatible, match="output"):
        Prune(ratios={"5": 0.5}).edit(small(), TASK)


def test_nothing_to_do():
    with pytest.raises(NothingToDo, match="round_to"):
        Prune(ratio=0.1, round_to=8).edit(small(), TASK)
    with pytest.raises(NothingToDo):
        Prune().edit(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), TASK)


def test_quantised_models_are_refused():
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    model = small()
    parametrize.register_parametrization(model[1].a, "weight", Half())
    with pytest.raises(Incompatible, match=r"1\.a"):
        Prune().edit(model, TASK)
    model = small()
    model.quantized = True
    with pytest.raises(Incompatible, match="quantised"):
        Prune().edit(model, TASK)


def test_custom_weights_are_not_cut():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))
            self.conv, self.out = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.conv(F.conv2d(x, self.weight)).mean((2, 3)))

    model = Own()
    edited = Prune(recover_epochs=0).edit(model, TASK)
    assert (edited.weight.shape[0], edited.conv.out_channels) == (8, 4)
    with pytest.raises(Incompatible, match="belongs to a Own"):
        cut(model, capture(model, TASK.example), {"weight": [0]})


def test_cut_refuses_bad_requests():
    model = small()
    graph = capture(model, TASK.example)
    with pytest.raises(NoMatch, match=r"2\.1"):
        cut(model, graph, {"2.2": [0]})
    with pytest.raises(Incompatible, match="output"):
        cut(model, graph, {"5": [0]})
    for units in ([], [24], [-1]):
        with pytest.raises(KnobError, match=r"0\.\.23"):
            cut(model, graph, {"2.1": units})


def test_no_branch_may_become_empty():
    torch.manual_seed(0)
    model = Random("sd", 4, one_d=False, flat=False)
    graph = capture(model, TASK.example)
    group = next(g for g in channel_groups(graph) if len(g.cells) == 2)
    with pytest.raises(KnobError, match="no channel in"):
        cut(model, graph, {group.name: group.cells[0]})


def test_code_that_depends_on_the_count_is_found():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8 * 64, 2)

        def forward(self, x):
            return self.out(self.a(x).reshape(-1, 8 * 64))

    with pytest.raises(Incompatible, match="after the cut the model does not run"):
        Prune(recover_epochs=0).edit(Fixed(), TASK)


def test_a_duck_of_a_task_is_enough_without_recovery():
    duck = SimpleNamespace(example=TASK.example)
    edited = Prune(recover_epochs=0, recalibrate=False).edit(small(), duck)
    assert edited[2][1].out_channels == 12


@pytest.mark.parametrize("knobs", [{"ratio": "half"}, {"round_to": 2.5}, {"ratios": {"a": "b"}}, {"recalibrate": "no"}])
def test_knobs_of_another_type_are_refused_in_words(knobs):
    with pytest.raises(KnobError, match="it must be"):
        Prune(**knobs)


def test_one_pattern_to_keep_may_stand_for_a_list():
    assert Prune(keep="head").keep == ("head",)
