"""capture: every style of writing a layer gives the same canonical nodes, exactly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from thrifty.capture import capture
from thrifty.errors import CaptureError, DataError
from thrifty.graph import OPERATORS, Graph, refusals

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """A module made of a function of (parts, x)."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph if n.op != "input"]


def of(function, x=X, **parts: nn.Module) -> Graph:
    return capture(Net(function, **parts), x)


def run(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    """Execute a graph with plain torch functions: an independent meaning of the attributes."""
    values = {}
    for n in graph:
        a = [values[i] for i in n.inputs]
        c = {k: torch.tensor(v) for k, v in n.constants.items()}
        at = n.attrs
        if n.op == "input":
            v = x
        elif n.op == "conv":
            v = pad(a[0], at["padding"], 0.0)
            conv = F.conv1d if c["weight"].dim() == 3 else F.conv2d
            v = conv(v, c["weight"], c.get("bias"), at["stride"], 0, at["dilation"], at["groups"])
        elif n.op == "linear":
            v = F.linear(a[0], c["weight"], c.get("bias"))
        elif n.op == "batchnorm":
            shape = (1, -1) + (1,) * (a[0].dim() - 2)
            v = a[0] * c["scale"].reshape(shape) + c["shift"].reshape(shape)
        elif n.op == "maxpool" and not at["ceil"]:
            pool = F.max_pool1d if len(at["kernel"]) == 1 else F.max_pool2d
            v = pool(pad(a[0], at["padding"], -torch.inf), at["kernel"], at["stride"])
        elif n.op in ("avgpool", "maxpool"):
            kind = "avg" if n.op == "avgpool" else "max"
            pool = getattr(F, f"{kind}_pool{len(at['kernel'])}d")
            more = {"count_include_pad": at["count_include_pad"]} if kind == "avg" else {}
            sides = tuple(p[0] for p in at["padding"])
            v = pool(a[0], at["kernel"], at["stride"], sides, ceil_mode=at["ceil"], **more)
        elif n.op == "pad":
            v = pad(a[0], at["padding"], 0.0)
        elif n.op == "permute":
            v = a[0].permute(0, *[i + 1 for i in at["axes"]])
        elif n.op == "concat":
            v = torch.cat(a, at["axis"] + 1)
        elif n.op == "softmax":
            v = a[0].softmax(at["axis"] + 1)
        elif n.op == "argmax":
            v = a[0].argmax(at["axis"] + 1, keepdim=at["keepdim"])
        else:
            plain = {"add": torch.add, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}
            v = a[0].flatten(1) if n.op == "flatten" else plain[n.op](*a)
        assert tuple(v.shape[1:]) == n.shape, (n.name, v.shape, n.shape)
        values[n.name] = v
    return values[graph.outputs[0]]


def pad(x, padding, value):
    flat = [side for pair in reversed(padding) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


class TestStyles:
    def test_functions_and_modules_give_the_same_nodes(self):
        conv = nn.Conv2d(3, 4, 3)
        modules = capture(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), X)
        functions = of(lambda s, x: F.max_pool2d(F.relu(s.conv(x)), 2).flatten(1), conv=conv)
        assert ops(modules) == ops(functions) == ["conv", "relu", "maxpool", "flatten"]
        for a, b in zip(modules.nodes[1:], functions.nodes[1:]):
            assert dict(a.attrs) == dict(b.attrs)
            assert a.shape == b.shape
        assert np.array_equal(modules.nodes[1].constants["weight"], conv.weight.detach().numpy())

    def test_names_modules_and_params(self):
        graph = of(lambda s, x: F.relu(s.stem(x)) + 0, stem=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6()))
        conv = graph["conv_0"] if "conv_0" in graph else graph["stem_0"]
        assert conv.module == "stem.0"
        assert dict(conv.params) == {"weight": "stem.0.weight", "bias": "stem.0.bias"}
        assert all(n.name.isidentifier() for n in graph)
        assert len({n.name for n in graph}) == len(graph.nodes)

    @pytest.mark.parametrize("path", ["register", "int", "ünïcode"])
    def test_names_are_c_identifiers(self, path):
        graph = capture(Net(lambda s, x: getattr(s, path)(x), **{path: nn.Conv2d(3, 1, 1)}), X)
        name = next(n.name for n in graph if n.op == "conv")
        assert name.isascii()
        assert name.isidentifier()
        assert name != path

    def test_a_module_that_is_called_twice_is_two_nodes_with_the_same_params(self):
        block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        graph = of(lambda s, x: s.block(s.block(x)), block=block)
        first, second = (n for n in graph if n.op == "conv")
        assert first.name != second.name
        assert first.params == second.params
        assert second.module == "block.0"

    @pytest.mark.parametrize(
        "function",
        [
            lambda s, x: x + x,
            lambda s, x: torch.add(x, x),
            lambda s, x: x.clone().add_(x),
        ],
    )
    def test_add(self, function):
        graph = of(function)
        assert ops(graph) == ["add"]
        assert graph.nodes[-1].inputs == ("input", "input")

    def test_relu6_in_all_its_spellings(self):
        for f in (F.relu6, lambda x: F.hardtanh(x, 0, 6), lambda x: x.clamp(0, 6), nn.ReLU6(inplace=True)):
            assert ops(of(lambda s, x, f=f: f(x * 1.0))) in (["batchnorm", "relu6"], ["relu6"])

    def test_relu_in_all_its_spellings(self):
        for f in (
            F.relu,
            torch.relu,
            lambda x: x.clamp(min=0),
            lambda x: x.clamp_min(0.0),
            nn.Threshold(0, 0),
        ):
            assert ops(of(lambda s, x, f=f: f(x))) == ["relu"]

    def test_what_does_nothing_vanishes(self):
        drop = nn.Sequential(nn.Dropout(), nn.Identity(), nn.Dropout2d())
        graph = of(lambda s, x: F.relu(s.drop(x).contiguous().clone()), drop=drop)
        assert ops(graph) == ["relu"]

    def test_in_place_on_a_shared_tensor(self):
        def function(s, x):
            y = s.conv(x)
            z = y.view(1, -1)
            F.relu_(y)
            return z

        graph = of(function, conv=nn.Conv2d(3, 2, 1))
        assert sorted(ops(graph)) == ["conv", "flatten", "relu"]

    def test_two_outputs(self):
        graph = of(lambda s, x: (x.mean((2, 3)), x + x))
        assert [graph[o].op for o in graph.outputs] == ["flatten", "add"]


class TestShapes:
    @pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.zeros(1, 4, 9), torch.zeros(2, 3, 6, 5)])
    def test_input_ranks(self, x):
        graph = of(lambda s, x: F.relu(x), x)
        assert graph["input"].shape == tuple(x.shape[1:])

    @pytest.mark.parametrize(
        "function",
        [
            lambda s, x: x.flatten(1),
            lambda s, x: x.view(x.size(0), -1),
            lambda s, x: x.reshape(x.shape[0], 3 * 8 * 8),
            lambda s, x: torch.flatten(x, 1),
            lambda s, x: x.view(x.size(0), 3, 64).view(x.size(0), -1),
        ],
    )
    def test_flatten(self, function):
        graph = of(function)
        assert ops(graph) == ["flatten"]
        assert graph.nodes[-1].shape == (192,)

    @pytest.mark.parametrize(
        "function",
        [
            lambda s, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
            lambda s, x: x.mean((2, 3)),
            lambda s, x: x.mean((-1, -2), keepdim=True).flatten(1),
            lambda s, x: F.avg_pool2d(x, 8).squeeze(3).squeeze(2),
        ],
    )
    def test_global_average_pool(self, function):
        graph = of(function)
        assert ops(graph) == ["avgpool", "flatten"]
        assert graph.nodes[1].attrs["kernel"] == (8, 8)

    @pytest.mark.parametrize(
        "function",
        [
            lambda s, x: x.amax((2, 3)),
            lambda s, x: F.adaptive_max_pool2d(x, 1).flatten(1),
            lambda s, x: F.max_pool2d(x, 8)[:, :, 0, 0] if False else F.max_pool2d(x, 8).flatten(1),
        ],
    )
    def test_global_max_pool(self, function):
        assert ops(of(function)) == ["maxpool", "flatten"]

    def test_maximum_over_time(self):
        graph = of(lambda s, x: x.max(dim=-1)[0], torch.zeros(1, 4, 9))
        assert ops(graph) == ["maxpool", "flatten"]
        assert graph.nodes[1].attrs["kernel"] == (9,)

    def test_adaptive_pool_that_divides(self):
        graph = of(lambda s, x: F.adaptive_avg_pool2d(x, (4, 2)))
        assert graph.nodes[-1].attrs["kernel"] == (2, 4)
        assert graph.nodes[-1].attrs["stride"] == (2, 4)

    def test_adaptive_pool_that_does_not_divide_is_refused_later(self):
        graph = of(lambda s, x: F.adaptive_avg_pool2d(x, 3))
        assert graph.nodes[-1].op == "aten.adaptive_avg_pool2d.default"
        assert "divides the map" in refusals(graph)[0]

    def test_permute_and_transpose(self):
        graph = of(lambda s, x: x.permute(0, 2, 3, 1).transpose(1, 2))
        assert [n.attrs["axes"] for n in graph if n.op == "permute"] == [(1, 2, 0), (1, 0, 2)]
        assert of(lambda s, x: x.movedim(1, -1)).nodes[-1].attrs["axes"] == (1, 2, 0)

    def test_concat_axes(self):
        assert of(lambda s, x: torch.cat([x, x], 1)).nodes[-1].attrs["axis"] == 0
        assert of(lambda s, x: torch.cat([x, x], dim=-1)).nodes[-1].attrs["axis"] == 2

    def test_softmax_and_argmax(self):
        graph = of(lambda s, x: x.softmax(-1).argmax(1), torch.zeros(1, 5))
        assert ops(graph) == ["softmax", "argmax"]
        assert graph.nodes[-1].shape == ()
        assert graph.nodes[-1].dtype == "int64"


class TestPadding:
    def test_zero_pad_folds_into_every_conv_that_reads_it(self):
        def function(s, x):
            y = s.pad(x)
            return s.a(y) + s.b(y)

        parts = {"pad": nn.ZeroPad2d((0, 1, 2, 3)), "a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)}
        graph = of(function, **parts)
        assert ops(graph) == ["conv", "conv", "add"]
        assert {n.attrs["padding"] for n in graph if n.op == "conv"} == {((2, 3), (0, 1))}

    def test_same_padding_with_an_even_kernel_is_asymmetric(self):
        graph = of(lambda s, x: s.c(x), c=nn.Conv2d(3, 2, (4, 3), padding="same"))
        assert graph.nodes[-1].attrs["padding"] == ((1, 2), (1, 1))

    def test_pad_before_a_pool_stays(self):
        graph = of(lambda s, x: F.max_pool2d(F.pad(x, (1, 1)), 2))
        assert ops(graph) == ["pad", "maxpool"]
        assert graph.nodes[1].attrs["padding"] == ((0, 0), (1, 1))

    @pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
    def test_other_padding_is_kept_by_name(self, mode):
        graph = of(lambda s, x: s.c(x), c=nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode))
        assert any(n.op not in OPERATORS for n in graph)

    def test_padding_channels_is_kept_by_name(self):
        graph = of(lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 1)))
        assert graph.nodes[-1].op == "aten.pad.default"


class TestRewrites:
    def test_relu_moves_before_the_pool(self):
        graph = of(lambda s, x: F.relu(F.max_pool2d(s.c(x), 2)), c=nn.Conv2d(3, 4, 3))
        assert ops(graph) == ["conv", "relu", "maxpool"]
        assert graph.fused_into("c") == "relu"
        assert graph.outputs == ("maxpool",)

    def test_relu_stays_when_it_could_not_fuse(self):
        graph = of(lambda s, x: F.relu(F.max_pool2d(x, 2)))
        assert ops(graph) == ["maxpool", "relu"]

    def test_constants_in_the_code_become_one_affine(self):
        mean = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
        graph = of(lambda s, x: (x / 255 - mean) / 2)
        assert ops(graph) == ["batchnorm"]
        assert np.allclose(graph.nodes[1].constants["scale"], 1 / 510)
        assert np.allclose(graph.nodes[1].constants["shift"], [-0.5, -1.0, -1.5])

    def test_ceil_mode_only_where_it_matters(self):
        assert not of(lambda s, x: F.max_pool2d(x, 2, ceil_mode=True)).nodes[-1].attrs["ceil"]
        assert of(lambda s, x: F.max_pool2d(x, 3, ceil_mode=True)).nodes[-1].attrs["ceil"]

    def test_dead_code_vanishes(self):
        def function(s, x):
            s.c(x)
            return x + x

        assert ops(of(function, c=nn.Conv2d(3, 4, 3))) == ["add"]


class TestWeights:
    def test_batch_norm_constants(self):
        norm = nn.BatchNorm2d(3)
        nn.init.uniform_(norm.weight)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        graph = capture(nn.Sequential(norm), X)
        node = graph.nodes[-1]
        x = torch.randn(4, 3, 8, 8)
        assert torch.allclose(run(graph, x), norm.eval()(x), atol=1e-6)
        assert node.params["running_mean"] == "0.running_mean"

    def test_parametrised_weights_are_evaluated_under_their_own_name(self):
        class Twice(nn.Module):
            def forward(self, w):
                return 2 * w

        layer = nn.Linear(5, 2)
        parametrize.register_parametrization(layer, "weight", Twice())
        node = capture(nn.Sequential(layer), torch.zeros(1, 5)).nodes[-1]
        assert node.params["weight"] == "0.weight"
        assert np.array_equal(node.constants["weight"], layer.weight.detach().numpy())

    def test_weight_norm_is_evaluated(self):
        layer = parametrizations.weight_norm(nn.Conv2d(3, 2, 3))
        node = capture(nn.Sequential(layer), X).nodes[-1]
        assert np.allclose(node.constants["weight"], layer.weight.detach().numpy(), atol=1e-7)

    def test_matmul_with_a_parameter_is_linear(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(4, 5))
                self.b = nn.Parameter(torch.randn(4))

            def forward(self, x):
                return x @ self.w.t() + self.b + torch.addmm(self.b, x, self.w.t())

        graph = capture(Functional(), torch.zeros(1, 5))
        assert ops(graph) == ["linear", "batchnorm", "linear", "add"]
        assert graph.nodes[1].params["weight"] == "w"
        model, x = Functional(), torch.randn(3, 5)
        assert torch.allclose(run(capture(model, x), x), model(x), atol=1e-5)

    def test_a_slice_of_a_weight_has_no_name(self):
        graph = of(lambda s, x: F.conv2d(x, s.c.weight[:2]), c=nn.Conv2d(3, 4, 3))
        assert graph.nodes[-1].op == "conv"
        assert "weight" not in graph.nodes[-1].params

    def test_rounding_is_copied(self):
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AvgPool2d(2))
        assert {n.attrs["rounding"] for n in capture(model, X).nodes[1:]} == {"half_up"}
        model.rounding = "floor"
        assert {n.attrs["rounding"] for n in capture(model, X).nodes[1:]} == {"floor"}

    @pytest.mark.parametrize(
        "layer",
        [
            lambda s, x: F.conv2d(x, s.c.weight * 2, s.c.bias * 2),
            lambda s, x: F.conv2d(x, (s.c.weight - s.c.weight.mean((1, 2, 3), keepdim=True)) / s.c.weight.std(), None),
            lambda s, x: F.linear(x.mean((2, 3)), s.f.weight.t()),
        ],
    )
    def test_a_weight_that_is_computed_in_forward_has_no_name(self, layer):
        # whoever read the tensor by that name would get other numbers
        model = Net(layer, c=nn.Conv2d(3, 4, 3), f=nn.Linear(3, 3))
        graph = capture(model, X)
        node = next(n for n in graph if n.op in ("conv", "linear"))
        assert not node.params
        x = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(run(graph, x), model(x))

    def test_a_batch_norm_with_computed_statistics_has_no_names_for_them(self):
        model = Net(
            lambda s, x: F.batch_norm(x, s.n.running_mean, s.n.running_var + 4, s.n.weight), n=nn.BatchNorm2d(3)
        )
        node = next(n for n in capture(model, X) if n.op == "batchnorm")
        assert node.params == {"weight": "n.weight", "running_mean": "n.running_mean"}


class TestWritingInPlace:
    """What torch.export leaves in place must not be lost."""

    def test_a_part_that_is_overwritten_is_refused(self):
        def function(s, x):
            y = s.c(x)
            y[:, 0] = 0
            return y

        assert any("select" in r for r in refusals(of(function, c=nn.Conv2d(3, 4, 3))))

    def test_a_view_that_is_overwritten_changes_its_base(self):
        def function(s, x):
            y = s.c(x)
            y.transpose(2, 3).relu_()
            return y + y

        model, x = Net(function, c=nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(run(capture(model, X), x), model(x))

    def test_a_dropout_is_the_tensor_that_it_reads(self):
        def function(s, x):
            y = s.c(x)
            return F.relu(s.d(y), inplace=True) + y

        with pytest.raises(CaptureError, match="inplace=False"):
            of(function, c=nn.Conv2d(3, 4, 3), d=nn.Dropout())

    def test_a_buffer_that_counts_calls_is_no_output(self):
        def function(s, x):
            s.n += 1
            y = s.c(x)
            z = y + y
            y.relu_()
            return y + z

        model = Net(function, c=nn.Conv2d(3, 4, 3))
        model.register_buffer("n", torch.zeros(1))
        graph, x = capture(model, X), torch.randn(1, 3, 8, 8)
        assert len(graph.outputs) == 1
        torch.testing.assert_close(run(graph, x), model(x))


class TestFakeQuantize:
    def test_formats_come_from_the_custom_operator(self):
        pytest.importorskip("thrifty.compress.fake_quantize")
        scale = torch.tensor([0.25])

        def function(s, x):
            fake = torch.ops.thrifty.fake_quantize
            w = fake(s.c.weight, torch.full((4,), 0.125), 4, True, 0)
            return fake(F.relu(F.conv2d(fake(x, scale, 8, True, -1), w, s.c.bias)), scale, 8, False, -1)

        graph = of(function, c=nn.Conv2d(3, 4, 3))
        assert ops(graph) == ["conv", "relu"]
        assert graph["input"].format.scale == (0.25,)
        conv, relu = graph.nodes[1:]
        assert conv.format is None
        assert (conv.weight_format.bits, len(conv.weight_format.scale)) == (4, 4)
        assert not relu.format.signed
        assert conv.params["weight"] == "c.weight"
        assert set(graph.quantised_points()) == {"input", relu.name}

    def test_a_value_read_before_and_after_is_refused(self):
        pytest.importorskip("thrifty.compress.fake_quantize")
        fake = torch.ops.thrifty.fake_quantize
        with pytest.raises(CaptureError, match="before and after"):
            of(lambda s, x: x + fake(x, torch.tensor([0.5]), 8, True, -1))


class TestRefusals:
    def test_data_dependent_control_flow(self):
        with pytest.raises(CaptureError, match="cannot read the model") as caught:
            of(lambda s, x: x + 1 if x.sum() > 0 else x)
        assert "test_capture.py" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_nan_weights_are_all_named(self):
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        with torch.no_grad():
            model[0].weight[0] = float("nan")
            model[1].running_var[1] = float("inf")
        with pytest.raises(DataError, match=r"0\.weight, 1\.running_var"):
            capture(model, X)

    @pytest.mark.parametrize("x", [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(0, 3), None])
    def test_unusable_examples(self, x):
        with pytest.raises(DataError, match="example"):
            capture(nn.Linear(3, 2), x)

    def test_a_constant_output(self):
        with pytest.raises(CaptureError, match="does not depend on its input"):
            of(lambda s, x: (x, torch.ones(1, 3)))

    def test_unknown_operators_keep_their_names_and_all_are_refused(self):
        graph = of(lambda s, x: torch.erf(s.act(x)) * x, act=nn.Sigmoid())
        assert ops(graph) == ["aten.sigmoid.default", "aten.erf.default", "aten.mul.Tensor"]
        assert len(refusals(graph)) == 3
        assert "'act'" in refusals(graph)[0]

    def test_linear_over_a_sequence_is_refused_later(self):
        graph = of(lambda s, x: s.f(x), torch.zeros(1, 4, 5), f=nn.Linear(5, 2))
        assert graph.nodes[-1].op == "aten.linear.default"

    @pytest.mark.parametrize("draw", [lambda x: torch.rand(1), lambda x: torch.randn(3, 1, 1)])
    def test_random_numbers_are_no_constants(self, draw):
        with pytest.raises(CaptureError, match="random numbers in eval mode"):
            of(lambda s, x: x + draw(x))

    @pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
    def test_weights_of_another_type_are_named(self, kind):
        with pytest.raises(DataError, match=r"0\.weight.*model\.float\(\)"):
            capture(nn.Sequential(nn.Conv2d(3, 4, 3).to(kind)), X)

    @pytest.mark.parametrize("what", [None, "net", F.relu])
    def test_only_modules_are_models(self, what):
        with pytest.raises(DataError, match=r"give a torch\.nn\.Module"):
            capture(what, X)

    def test_the_logs_of_torch_stay_away(self, capfd):
        with pytest.raises(CaptureError):
            of(lambda s, x: s.f(x), f=nn.Linear(7, 4))
        assert capfd.readouterr() == ("", "")


def test_the_model_is_not_touched():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    model[0].hard = True
    capture(model, X)
    assert model.training
    assert model[1].training
    assert model[0].hard
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def everything() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    two_d = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(True),
        nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.Hardswish(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Conv2d(8, 12, (1, 3), dilation=(1, 2), padding=(0, 1), groups=4),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5), nn.Softmax(1),
    )  # fmt: skip
    one_d = nn.Sequential(
        nn.Conv1d(4, 6, 5, stride=2, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.ConstantPad1d((1, 0), 0.0),
        nn.Conv1d(6, 6, 3, groups=3), nn.MaxPool1d(2), nn.AvgPool1d(2, 2, 1), nn.ReLU(),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip

    def mixed(s, x):
        y = F.relu(s.a(x)) + s.b(x)
        z = torch.cat([y, F.max_pool2d(F.pad(y, (1, 0, 1, 0)), 2, 1)], 1)
        z = F.relu(F.max_pool2d(s.c(z), 2))
        return s.d(z.permute(0, 2, 3, 1).reshape(z.shape[0], -1))

    parts = {
        "a": nn.Conv2d(3, 4, 3, padding=1),
        "b": nn.Conv2d(3, 4, 1),
        "c": nn.Conv2d(8, 6, 3),
        "d": nn.Linear(54, 2),
    }
    return {
        "2-D": (two_d, torch.randn(4, 3, 15, 17)),
        "1-D": (one_d, torch.randn(4, 4, 40)),
        "mixed": (Net(mixed, **parts), torch.randn(4, 3, 8, 8)),
        "vector": (
            nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
            torch.randn(4, 7),
        ),
    }


@pytest.mark.parametrize("name", ["2-D", "1-D", "mixed", "vector"])
def test_the_graph_computes_what_the_model_does(name):
    torch.manual_seed(0)
    model, x = everything()[name]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    graph = capture(model, x)
    assert not refusals(graph)
    assert torch.allclose(run(graph, x), model.eval()(x), atol=2e-6)
