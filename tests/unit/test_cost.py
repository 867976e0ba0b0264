"""count: the numbers of MLPerf Tiny and of hand counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thrifty.arith import Format
from thrifty.capture import capture
from thrifty.cost import Cost, count, count_nodes, format_of
from thrifty.errors import UnsupportedModel
from thrifty.graph import Graph
from thrifty.zoo import create


def graph_of(name: str, **options) -> tuple[Graph, nn.Module]:
    model = create(name, **options)
    return capture(model, torch.zeros(1, *model.input_shape)), model


def quantised(graph: Graph, scale: float = 0.1, bits: int = 8) -> Graph:
    """Give every point and weight a format."""
    points = graph.quantised_points()
    nodes = {}
    for n in graph:
        weight = Format(bits, True, (scale,) * n.shape[0]) if n.op in ("conv", "linear") else None
        nodes[n.name] = replace(n, format=Format(8, True, (scale,)) if n.name in points else None, weight_format=weight)
    return graph.with_nodes(nodes)


@pytest.mark.parametrize(
    ("name", "macs"),
    [("resnet-8", 12_501_632), ("ds-cnn", 2_656_768), ("mobilenet-v1", 7_489_664), ("autoencoder", 264_192)],
)
def test_mlperf_tiny(name, macs):
    graph, model = graph_of(name)
    cost = count(graph)
    assert cost.macs == macs
    assert cost.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("filters", "params", "macs"),
    [(8, 1150, 97_328), (16, 3958, 333_920), (32, 14_566, 1_224_896), (80, 86_326, 7_240_160)],
)
def test_resnetv1_6(filters, params, macs):
    cost = count(graph_of("resnetv1-6", filters=filters)[0])
    assert (cost.params, cost.macs, cost.weight_bytes) == (params, macs, 4 * params)


# the live-set lower bounds of int8 activations, ../shared/specs/deploy.md sections 1b and 6.3
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("resnet-8", 49_152),
        ("ds-cnn", 16_000),
        ("mobilenet-v1", 55_296),
        ("lenet", 576),
        ("autoencoder", 768),
        ("resnetv1-6", 5120),
    ],
)
def test_activation_bytes(name, bound):
    graph, _ = graph_of(name)
    integer = quantised(fold(graph))
    assert count(integer).activation_bytes == bound
    if name != "autoencoder":
        assert count(graph).activation_bytes == 4 * bound


def fold(graph: Graph) -> Graph:
    """Drop the batch norms, as if they were folded."""
    source = {n.name: n.inputs[0] for n in graph if n.op == "batchnorm"}
    kept = [replace(n, inputs=tuple(source.get(i, i) for i in n.inputs)) for n in graph if n.name not in source]
    return Graph(tuple(kept), graph.outputs)


def test_parts_add_up_and_say_where():
    graph, _ = graph_of("resnet-8")
    rows = count_nodes(graph)
    assert [name for name, _, _ in rows] == [n.name for n in graph]
    assert sum((c for _, _, c in rows), Cost()) == count(graph)
    assert max(c.activation_bytes or 0 for _, _, c in rows) == count(graph).activation_bytes


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.conv(x)))


def test_shared_weights_count_once_and_macs_twice():
    cost = count(capture(Twice(), torch.zeros(1, 4, 10)))
    assert cost.params == 4 * 4 * 3 + 4
    assert cost.macs == 2 * 10 * 4 * 4 * 3
    assert cost.weight_bytes == 4 * cost.params


def test_weight_bytes_at_their_width():
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), torch.zeros(1, 5))
    assert count(graph).weight_bytes == 4 * 18
    assert count(quantised(graph)).weight_bytes == 15 + 3 * 8  # bias and multiplier
    assert count(quantised(graph, bits=4)).weight_bytes == 8 + 3 * 8
    assert count(quantised(graph, scale=0.25)).weight_bytes == 15 + 3 * 4  # powers of two: shifts, no multipliers
    assert count(quantised(graph, bits=16)).weight_bytes == 30 + 3 * 8


def test_batch_norm_costs_what_is_stored():
    conv = nn.Conv2d(2, 3, 1, bias=False)
    x = torch.zeros(1, 2, 4, 4)
    folded = count(capture(nn.Sequential(conv, nn.BatchNorm2d(3)), x))
    assert (folded.params, folded.weight_bytes, folded.macs) == (12, 4 * 9, 6 * 16)
    alone = count(capture(nn.Sequential(nn.BatchNorm2d(2), conv), x))
    assert (alone.params, alone.weight_bytes, alone.macs) == (10, 4 * 10, 2 * 16 + 6 * 16)


def test_adding_in_place_and_flatten_take_no_memory():
    class Net(nn.Module):
        def forward(self, x):
            return F.hardswish(x + x).flatten(1)

    assert count(capture(Net(), torch.zeros(1, 2, 4))).activation_bytes == 8 * 4


def test_format_of_fused_and_kept():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    graph = quantised(capture(model, torch.zeros(1, 2, 4, 4)))
    conv, relu, pool, flat = (n.name for n in graph.nodes[1:])
    assert graph[conv].format is None
    assert format_of(graph, conv) == format_of(graph, relu) == format_of(graph, pool) == format_of(graph, flat)
    assert format_of(graph, flat) is not None


def test_all_unknown_operators_are_listed():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sigmoid(), nn.GELU())
    with pytest.raises(UnsupportedModel) as caught:
        count(capture(model, torch.zeros(1, 2, 4, 4)))
    assert len(caught.value.refusals) == 2
    assert "'1'" in caught.value.refusals[0]
    assert "supported" in caught.value.refusals[1]
