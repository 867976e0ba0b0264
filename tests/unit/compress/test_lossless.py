"""Lossless: smaller, and the same function."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import Random, shake
from torch import nn
from torch.nn import functional as F

from thrifty.capture import capture
from thrifty.compress.lossless import Lossless, constants
from thrifty.cost import count
from thrifty.errors import Incompatible, KnobError, NothingToDo
from thrifty.zoo import create

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TASK = SimpleNamespace(example=X[:1])


def shrink(model: nn.Module, x: torch.Tensor = X, **knobs) -> nn.Module:
    """Edit, and check that outputs are equal and the caller's model is not touched."""
    model.eval()
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    edited = Lossless(**knobs).edit(model, SimpleNamespace(example=x[:1]))
    assert torch.allclose(edited(x), expected, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    old, new = (sum(p.numel() for p in m.parameters()) for m in (model, edited))
    assert new < old
    return edited


def head(c: int, *body: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 2))
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.reset_parameters()
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    return model.eval()


def kill(conv: nn.Module, *channels: int, bias: float | None = None) -> None:
    with torch.no_grad():
        conv.weight[list(channels)] = 0
        if bias is not None:
            conv.bias[list(channels)] = bias


class TestDead:
    def test_zero_filters_with_zero_bias(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        kill(model[0], 1, 5, bias=0.0)
        edited = shrink(model)
        assert edited[0].out_channels == edited[2].in_channels == 6

    def test_a_constant_goes_into_the_bias_of_its_reader(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False))
        kill(model[0], 0, 7, bias=0.5)
        edited = shrink(model)
        assert edited[0].out_channels == 6
        assert edited[2].bias.shape == (6,)
        assert model[2].bias is None

    def test_a_constant_under_zero_padding_stays(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        kill(model[0], 0, bias=0.5)
        with pytest.raises(NothingToDo, match="prune"):
            Lossless().edit(model, TASK)

    def test_a_negative_constant_dies_in_the_relu(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        kill(model[0], 3, bias=-0.5)
        assert shrink(model)[0].out_channels == 7

    def test_through_batch_norm_hardswish_pools_and_flatten(self):
        torch.manual_seed(0)
        model = head(1, nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), nn.AvgPool2d(2))
        model = nn.Sequential(*model[:4], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
        kill(model[0], 2)
        edited = shrink(model)
        assert (edited[0].out_channels, edited[1].num_features, edited[6].in_features) == (7, 7, 7)

    def test_a_batch_norm_of_scale_zero(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
        with torch.no_grad():
            model[1].weight[[0, 4]] = 0
        assert shrink(model)[0].out_channels == 6

    def test_unused_channels(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        with torch.no_grad():
            model[2].weight[:, [1, 2]] = 0
        assert shrink(model)[0].out_channels == 6

    def test_everything_downstream_that_becomes_constant_goes(self):
        body = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)
        model = head(4, *body)
        kill(model[0], 0, 1, bias=0.25)
        with torch.no_grad():
            model[2].weight[:2, 2:] = 0  # outputs 0 and 1 read only the constants
        edited = shrink(model)
        assert (edited[0].out_channels, edited[2].out_channels) == (6, 4)

    def test_one_channel_always_stays(self):
        model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
        kill(model[0], *range(8), bias=0.5)
        assert shrink(model)[0].out_channels == 1

    def test_residual_needs_both(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
                self.c, self.out = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

            def forward(self, x):
                x = self.a(x)
                return self.out(self.c(F.relu(x + self.b(x))).mean((2, 3)))

        torch.manual_seed(0)
        model = Residual()
        kill(model.a, 0, 1, 2, bias=0.0)
        kill(model.b, 1, 2, 3, bias=0.0)
        edited = shrink(model)
        assert (edited.a.out_channels, edited.b.in_channels, edited.c.in_channels) == (6, 6, 6)

    def test_grouped_and_concatenated(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
                self.g, self.out = nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 2)

            def forward(self, x):
                return self.out(F.relu(self.g(F.relu(torch.cat([self.a(x), self.b(x)], 1)))).mean((2, 3)))

        torch.manual_seed(0)
        model = Net()
        kill(model.a, 1, bias=0.5)
        kill(model.b, 1, bias=-0.5)
        kill(model.b, 2, bias=0.5)  # its partner in the other group lives: it stays
        edited = shrink(model)
        assert (edited.a.out_channels, edited.b.out_channels, edited.g.in_channels) == (3, 3, 6)
        assert edited.g.out_channels == 8

    def test_round_to_keeps_multiples(self):
        model = head(6, nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 3))
        kill(model[0], *range(6), bias=0.5)
        assert shrink(model)[0].out_channels == 10
        assert shrink(model, round_to=4)[0].out_channels == 12


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    letters=st.text("crsdmgpk", min_size=1, max_size=3).filter(lambda t: t.count("p") < 3),
    one_d=st.booleans(),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_networks_keep_their_function(letters, one_d, flat, seed):
    """Zero, copy and mute filters at random: what is removed must not change the outputs."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = shake(Random(letters, 8, one_d, flat))
    x = torch.randn(4, 3, 8) if one_d else torch.randn(4, 3, 8, 8)
    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
            with torch.no_grad():
                rows = rng.permutation(len(m.weight))[:5]
                m.weight[rows[:2]] = 0
                m.weight[rows[3]] = m.weight[rows[2]].clone()
                if m.bias is not None:
                    m.bias[rows[0]] = float(rng.choice([0.0, -0.5, 0.5]))
                    m.bias[rows[3]] = m.bias[rows[2]].clone()
    with contextlib.suppress(NothingToDo):  # all constants under padding, all copies in sums
        shrink(model, x)


def test_mobilenet_with_dead_output_filters_of_its_1x1_layers():
    """As in the official VWW model (anchors.md, section 6.7): the depthwise layers shrink too."""
    torch.manual_seed(0)
    model = create("mobilenet-v1").eval()
    rng = np.random.default_rng(0)
    x = torch.rand(2, *model.input_shape)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.2)
    graph = capture(model, x)
    points = [n for n in graph if n.op == "conv" and n.constants["weight"].shape[2:] == (1, 1)]
    dead = {}
    for node in points[5:-1]:
        gone = rng.choice(node.shape[0], node.shape[0] // 2, replace=False)
        dead[node.module] = len(gone)
        norm = model.get_submodule(next(graph[c].module for c in graph.consumers[node.name]))
        with torch.no_grad():
            model.get_submodule(node.module).weight[gone] = 0
            norm.bias[gone] = -norm.running_mean[gone].abs() - 1  # dies in the activation
    edited = shrink(model, x)
    for name, n in dead.items():
        assert edited.get_submodule(name).out_channels <= model.get_submodule(name).out_channels - n
    depthwise = [m for m in edited.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert count(capture(edited, x)).macs < 0.8 * count(graph).macs


class TestDuplicates:
    def test_equal_filters_merge(self):
        model = head(6, nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        with torch.no_grad():
            for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
                if tensor.dim():
                    tensor[[3, 6]] = tensor[1].clone()
        edited = shrink(model)
        assert edited[0].out_channels == 6
        summed = model[3].weight[:, [1, 3, 6]].sum(1)
        assert torch.allclose(edited[3].weight[:, 1], summed)

    def test_equal_filters_with_other_batch_norms_stay(self):
        model = head(6, nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
        with torch.no_grad():
            model[0].weight[3] = model[0].weight[1]
        with pytest.raises(NothingToDo):
            Lossless().edit(model, TASK)

    def test_through_depthwise_and_flatten(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 5, groups=6), nn.Flatten(), nn.Linear(96, 2))
        with torch.no_grad():
            for layer in model[:2]:
                layer.weight[4] = layer.weight[2]
                layer.bias[4] = layer.bias[2]
        edited = shrink(model)
        assert (edited[1].groups, edited[3].in_features) == (5, 80)


class TestLowRank:
    def test_linear_becomes_two(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 2))
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(40, 5) @ torch.randn(5, 192) / 20)
        edited = shrink(model)
        first, second = edited[1]
        assert (first.out_features, second.out_features) == (5, 40)
        assert first.bias is None
        assert torch.equal(second.bias, model[1].bias)

    def test_pointwise_conv_becomes_two(self):
        model = head(16, nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1, stride=2))
        with torch.no_grad():
            model[2].weight.copy_((torch.randn(16, 3) @ torch.randn(3, 16))[..., None, None] / 4)
        edited = shrink(model)
        assert edited[2][0].stride == (2, 2)
        assert edited[2][0].out_channels == 3
        with pytest.raises(NothingToDo):
            Lossless(low_rank=False).edit(model, TASK)

    def test_no_split_where_it_would_not_pay(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 3))
        with torch.no_grad():  # rank 2 of 3 x 4: 2 * 7 > 12
            model[3].weight.copy_(torch.randn(3, 2) @ torch.randn(2, 4))
        with pytest.raises(NothingToDo):
            Lossless().edit(model, TASK)


def test_nothing_to_do_and_refusals():
    model = head(6, nn.Conv2d(3, 6, 3))
    with pytest.raises(NothingToDo):
        Lossless().edit(model, TASK)
    model.quantized = True
    with pytest.raises(Incompatible, match="lossless first"):
        Lossless().edit(model, TASK)
    with pytest.raises(KnobError):
        Lossless(round_to=0)


def test_editing_twice_finds_nothing_more():
    model = head(6, nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    kill(model[0], 1, bias=0.5)
    with pytest.raises(NothingToDo):
        Lossless().edit(shrink(model), TASK)


def test_constants_of_a_graph():
    model = head(6, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1))
    kill(model[0], 0, bias=2.0)
    kill(model[0], 1, bias=-2.0)
    known = constants(capture(model, X))
    relu = next(v for k, v in known.items() if "relu" in k)
    assert relu[:2].tolist() == [2.0, 0.0]
    assert np.isnan(relu[2:]).all()
