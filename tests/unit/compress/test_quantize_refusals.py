"""What Quantize refuses, and what the sentences name."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from thrifty.capture import capture
from thrifty.compress import Quantize, Train
from thrifty.deploy.lower import check
from thrifty.errors import DataError, Incompatible, KnobError, UnsupportedModel
from thrifty.task import Task


def maps(factor=1.0):
    """Return a task of maps (4, 6, 6)."""
    x = np.random.default_rng(0).normal(size=(40, 4, 6, 6)).astype(np.float32)
    return Task.from_arrays(x * np.float32(factor), np.arange(40) % 2)


class Net(nn.Module):
    """Layers, and a forward that is given."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.norm, self.h = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.w, self.run = nn.Parameter(torch.randn(4, 2)), run
        self.eval()

    def forward(self, x):
        return self.run(self, x)


def plain():
    """Return two convolutions with ReLU6, and a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()


def refused(model, technique=None, task=None):
    with pytest.raises(UnsupportedModel) as caught:
        (technique or Quantize(calibration_samples=16)).edit(model, task or maps())
    return caught.value.refusals


# --- operators ---

COMPUTED = {
    "a fixed matrix": (lambda m, x: m.c(x).mean((2, 3)) @ torch.ones(4, 2), "linear"),
    "a multiple of a weight": (lambda m, x: m.h(F.conv2d(x, m.c.weight * 2).mean((2, 3))), "conv"),
    "fixed filters": (lambda m, x: m.h(F.conv2d(x, torch.ones(4, 4, 1, 1)).mean((2, 3))), "conv"),
    "a transposed weight": (lambda m, x: F.linear(x.mean((2, 3)), m.w.t()), "linear"),
    "and a batch norm": (lambda m, x: m.h(m.norm(F.conv2d(x, torch.ones(4, 4, 1, 1))).mean((2, 3))), "conv"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_no_parameter_is_named(name):
    run, op = COMPUTED[name]
    (sentence,) = refused(Net(run))
    assert f"the weight of this {op} is no parameter" in sentence


def test_all_refusals_come_at_once_with_what_to_use():
    sentences = refused(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.GELU()))
    assert len(sentences) == 3  # though no layer could be quantised
    assert "flatten first, or a 1x1 convolution" in sentences[0]
    assert "supported: softmax, hardswish or relu" in sentences[1]
    mixed = refused(Net(lambda m, x: m.h(F.gelu(m.c(x)).mean((2, 3))) @ torch.ones(2, 2)))
    assert len(mixed) == 2


def end(channels, *layers):
    return nn.Sequential(nn.Conv2d(4, 4, 3), *layers, nn.Flatten(), nn.Linear(channels, 2)).eval()


UNDEPLOYABLE = {
    "dilation": end(16, nn.Conv2d(4, 4, 2, dilation=2)),
    "a lone pad": end(144, nn.ZeroPad2d(1), nn.ReLU()),
    "softmax over channels": end(64, nn.Softmax(1)),
    "a mean of cut windows": end(16, nn.AvgPool2d(3, 2, ceil_mode=True)),
    "a mean without padding": end(36, nn.AvgPool2d(2, 2, padding=1, count_include_pad=False)),
    "argmax over channels": Net(lambda m, x: m.c(x).argmax(1)),
}


@pytest.mark.parametrize("name", UNDEPLOYABLE)
def test_what_lowering_refuses_by_structure_is_refused_before_calibration(name):
    sentences = refused(UNDEPLOYABLE[name])
    assert len(sentences) == len(check(capture(UNDEPLOYABLE[name], maps().example))) == 1


def test_sixteen_bits_say_what_to_use_for_each_operator():
    table, scores = refused(end(64, nn.Hardswish(), nn.Flatten()).append(nn.Softmax(1)), Quantize(bits=16))
    assert "hardswish" in table
    assert table.endswith("use ReLU or ReLU6")
    assert scores.endswith("leave it out: the largest score stays so")


# --- copies ---


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("technique", [Quantize(), Train(epochs=1)])
def test_weights_that_hooks_compute_are_refused_with_what_to_do(technique):
    model = plain()
    prune.l1_unstructured(model[0], "weight", 0.5)
    nn.utils.weight_norm(model[2])(torch.zeros(1, 8, 6, 6))
    with pytest.raises(Incompatible) as caught:
        technique.edit(model, maps())
    assert "0: call torch.nn.utils.prune.remove(module, 'weight')" in str(caught.value)
    assert "2: call torch.nn.utils.remove_weight_norm(module)" in str(caught.value)


def test_another_tensor_with_a_history_is_named():
    model = plain()
    model[6].cache = model[6].weight * 2
    with pytest.raises(Incompatible, match="6: 'cache' is computed"):
        Quantize().edit(model, maps())


# --- numbers ---


def test_a_negative_variance_is_named_not_the_layer_before_it():
    model = end(64, nn.BatchNorm2d(4))
    model[1].running_var[2] = -3
    with pytest.raises(DataError, match=r"^1\.running_var reaches -3"):
        Quantize().edit(model, maps())


def test_large_biases_name_the_layer_and_what_to_change():
    model = plain()
    with torch.no_grad():
        model[2].bias[1], model[6].bias[0] = 3e4, -3e4
    with pytest.raises(KnobError) as caught:
        Quantize.microai(16).edit(model, maps())
    for part in ("2 (", "6 (", "a bias of 30000", "fraction_bits", "granularity='layer'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("training", [False, True])
def test_nan_inputs_are_refused_by_the_exact_form(training):
    quantized = Quantize(calibration_samples=16).edit(plain(), maps())
    quantized.train(training).training_hard = training
    x = maps().example.clone()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="1 NaN values"):
        quantized(x)
    x[0, 0, 0, 0] = torch.inf  # saturates, as on the device
    assert training or bool(quantized(x).isfinite().all())


def test_every_layer_whose_scale_is_beyond_float32_is_named():
    model = plain()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-42)
    with pytest.raises(KnobError, match=r"0 \(conv_0\): a scale must lie in .*; 2 \(conv_2\): a scale"):
        Quantize().edit(model, maps())


@pytest.mark.parametrize("technique", [Quantize(), Quantize(bits=16), Quantize(scales="power_of_two")])
def test_sums_far_above_the_clip_are_refused_at_the_layer_that_has_them(technique):
    model = plain()
    with torch.no_grad():
        model[2].bias[1] = 3e30
    (sentence,) = refused(model, technique)
    assert sentence.startswith("2 (conv_2): its range is")
    (sentence,) = refused(plain(), technique, maps(1e30))
    assert sentence.startswith("0 (conv_0): its range is")


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_weights_a_thousand_times_too_large_still_quantise(bits):
    model = plain()
    with torch.no_grad():
        model[2].weight.mul_(1e3)
    assert Quantize(bits=bits).edit(model, maps())(maps().example).isfinite().all()
