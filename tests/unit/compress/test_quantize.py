import copy
import json

import numpy as np
import pytest
import torch
from compress_nets import NETS, Residual, digits, net, signals, task_of, trained
from torch import nn

from thrifty.capture import capture
from thrifty.compress import Quantize, QuantizedModel
from thrifty.compress.execute import exact_constants
from thrifty.deploy.lower import check, lower
from thrifty.deploy.run import predict
from thrifty.errors import DataError, Incompatible, KnobError, NoMatch, NothingToDo, StoreError, UnsupportedModel
from thrifty.task import Task

SCHEMES = {
    "int8": Quantize(),
    "int8-layer-shift": Quantize(scales="power_of_two", granularity="layer", ranges="minmax"),
    "int8-channel-shift": Quantize(scales="power_of_two"),
    "int8-floor": Quantize(scales="power_of_two", rounding="floor", unsigned=False),
    "int4-weights": Quantize(weight_bits=4, weight_ranges="mse"),
    "int5": Quantize(bits=5, ranges="percentile", percentile=99.0),
    "int16": Quantize(bits=16),
    "int16-network": Quantize(bits=16, granularity="network", scales="power_of_two"),
    "int12-shift": Quantize(bits=12, scales="power_of_two", granularity="layer"),
}


# --- the exact integers ---


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NETS)
def test_hard_torch_is_the_program(name, scheme):
    model, technique = net(name), SCHEMES[scheme]
    if name == "odd" and technique.bits > 8:
        with pytest.raises(UnsupportedModel, match="hardswish takes 8 bits or fewer"):
            technique.edit(model, task_of(name))
        return
    quantized = technique.edit(model, task_of(name))
    graph = capture(quantized, task_of(name).example)
    assert check(graph) == ()
    x = task_of(name).validation.x[:40]
    expected = predict(lower(graph), x.numpy())
    given = quantized(x)
    assert np.array_equal(given.numpy().reshape(len(x), -1), expected.reshape(len(x), -1))
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("name", NETS)
def test_capture_of_the_soft_form_has_the_formats_that_the_exact_form_uses(name):
    quantized = Quantize(weight_bits=6).edit(net(name), task_of(name))
    own, exported = quantized.formatted(), capture(quantized, task_of(name).example)
    assert [n.name for n in own] == [n.name for n in exported]
    for a, b in zip(own, exported):
        assert (a.op, a.format, a.weight_format, a.attrs) == (b.op, b.format, b.weight_format, b.attrs)
        assert all(np.array_equal(a.constants[k], b.constants[k]) for k in b.constants)


def awkward():
    """A dead channel, a dead layer, a bias far above its weights, a weight far above the others."""
    model = net("residual")
    with torch.no_grad():
        model.conv1.weight[0] = 0
        model.conv1.bias[1] = 1e4
        model.conv2.weight[2] *= 1e-12
        model.narrow.weight.zero_()
        model.head.weight[3, 3] = 300.0
    return model


@pytest.mark.parametrize("scheme", ["int8", "int8-layer-shift", "int4-weights", "int16", "int16-network"])
def test_awkward_weights_still_lower_and_agree(scheme):
    quantized = SCHEMES[scheme].edit(awkward(), digits())
    graph = capture(quantized, digits().example)
    assert check(graph) == ()
    x = digits().validation.x[:20] * 50  # saturates
    assert np.array_equal(quantized(x).numpy(), predict(lower(graph), x.numpy()))


def test_exact_convolution_uses_float64_where_float32_would_round():
    quantized = Quantize(bits=16).edit(trained(), digits())
    graph = quantized.formatted()
    constants = exact_constants(graph, graph["head"], torch.device("cpu"))
    assert constants.weight.dtype == torch.float64
    graph = Quantize().edit(trained(), digits()).formatted()
    assert exact_constants(graph, graph["head"], torch.device("cpu")).weight.dtype == torch.float32


def test_constants_follow_a_weight_that_changes():
    quantized = Quantize().edit(trained(), digits())
    before = quantized(digits().example)
    with torch.no_grad():
        quantized.model.head.bias.add_(1.0)
    assert not torch.equal(quantized(digits().example), before)


def test_soft_and_exact_agree_within_a_few_steps():
    quantized = Quantize().edit(trained(), digits())
    step = quantized.point("head").format.scale[0]
    exact = quantized(digits().validation.x)
    quantized.hard = False
    assert (quantized(digits().validation.x) - exact).abs().max() <= 8 * step


# --- formats ---


def test_tensors_that_cannot_be_negative_are_unsigned():
    quantized = Quantize().edit(trained(), digits())
    signed = {n.name: quantized.point(n.name).signed for n in quantized.graph if quantized.has_point(n.name)}
    assert not signed["relu"]
    assert not signed["relu_2"]
    assert signed["input"]
    assert signed["late"]
    assert all(p.signed for p in Quantize(unsigned=False).edit(trained(), digits()).points.values())
    assert all(p.signed for p in Quantize(bits=16).edit(trained(), digits()).points.values())


def test_microai_schemes():
    wide = Quantize.microai(16).edit(trained(), digits())
    assert {p.format.scale for p in wide.points.values()} == {(2.0**-9,)}
    assert wide.weight_quantizer("head.weight").format.scale == (2.0**-9,)
    narrow = Quantize.microai(8).edit(trained(), digits())
    assert all(p.format.power_of_two and p.signed for p in narrow.points.values())
    assert len(narrow.weight_quantizer("conv1.weight").format.scale) == 1


def test_per_layer_bits_first_match_counts():
    quantized = Quantize(per_layer={"conv1": 4, "conv*": 6}).edit(trained(), digits())
    bits = {name: quantized.weight_quantizer(name).bits for name in quantized.sites}
    assert bits == {"conv1.weight": 4, "conv2.weight": 6, "late.weight": 8, "narrow.weight": 8, "head.weight": 8}


def test_shared_layer_has_one_weight_format_and_a_format_per_call():
    quantized = Quantize().edit(net("signal"), signals())
    assert len(quantized.sites["again.weight"]) == 3
    calls = [n.name for n in quantized.graph if n.params.get("weight") == "again.weight"]
    scales = {quantized.format_of(name).scale for name in calls}
    assert len(scales) == 3


def test_floor_rounding_changes_the_output():
    x = digits().validation.x
    technique = {"scales": "power_of_two", "granularity": "layer"}
    a = Quantize(**technique).edit(trained(), digits())(x)
    b = Quantize(**technique, rounding="floor").edit(trained(), digits())(x)
    assert (b - a).mean() < 0


# --- refusals ---


def test_knobs_are_refused_all_at_once():
    with pytest.raises(KnobError) as caught:
        Quantize(bits=1, scales="power_of_tow", rounding="floor", fraction_bits=9, per_layer={"a": 12})
    text = str(caught.value)
    for part in ("bits is 1", "close: power_of_two", "rounding='floor' needs", "fraction_bits needs", "[12]"):
        assert part in text


MISTYPED = {
    "bits is '8'; it must be a whole number": {"bits": "8"},
    "bits is None": {"bits": None},
    "bits is 8.0": {"bits": 8.0},
    "per_layer is {'0': None}; it must be a table whose values are a whole number": {"per_layer": {"0": None}},
    "per_layer is ['0']": {"per_layer": ["0"]},
    "calibration_samples is 2.5": {"calibration_samples": 2.5},
    "epochs is 1.5": {"epochs": 1.5},
    "training is 3; it must be a table": {"training": 3},
    "batch is 'a'; it must be a whole number": {"training": {"batch": "a"}},
    "milestones is 3; it must be a list": {"training": {"milestones": 3}},
    "scales is 3; it must be text": {"scales": 3},
}


@pytest.mark.parametrize("sentence", MISTYPED)
def test_values_of_the_wrong_type_are_refused_in_words(sentence):
    with pytest.raises(KnobError) as caught:
        Quantize(**MISTYPED[sentence])
    assert sentence in str(caught.value)


def test_a_training_option_that_does_not_exist_is_refused_at_once():
    with pytest.raises(KnobError, match="mixupp"):
        Quantize(epochs=1, training={"mixupp": 0.2})


def test_a_pattern_without_match_is_refused():
    with pytest.raises(NoMatch, match="'convv1' matches no layer, close: conv1"):
        Quantize(per_layer={"convv1": 4}).edit(trained(), digits())


def test_quantising_twice_is_refused():
    with pytest.raises(Incompatible, match="already"):
        Quantize().edit(Quantize().edit(trained(), digits()), digits())


def test_nothing_to_quantise_is_refused():
    with pytest.raises(NothingToDo):
        Quantize().edit(nn.Sequential(nn.ReLU(), nn.Flatten()), digits())


def test_unsupported_operators_are_listed_with_their_modules():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(72, 10), nn.Tanh())
    with pytest.raises(UnsupportedModel) as caught:
        Quantize().edit(model, digits())
    assert len(caught.value.refusals) == 2
    assert "sigmoid" in str(caught.value)
    assert "tanh" in str(caught.value)


def test_calibration_that_overflows_is_refused():
    task = Task.from_arrays(np.full((40, 4), 1e30, np.float32), np.arange(40) % 2)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].weight, 1e10)
    with pytest.raises(DataError, match="1: the model gives NaN or infinite"):
        Quantize().edit(model, task)


# --- accuracy ---


def agreement(technique):
    """Return the score, and the share of validation labels that equal the float model's."""
    x = digits().validation.x
    quantized = technique.edit(trained(), digits())
    same = (quantized(x).argmax(1) == trained()(x).argmax(1)).float().mean()
    return digits().score(quantized), float(same)


def test_int16_after_training_gives_the_float_labels():
    for technique in (Quantize(bits=16), Quantize.microai(16)):
        assert agreement(technique)[1] >= 0.99


def test_int8_after_training_stays_within_a_point():
    score, same = agreement(Quantize())
    assert score >= digits().score(trained()) - 0.012
    assert same >= 0.97


def learnt(technique):
    """Return the score on the training data, which is what training improves."""
    return digits().score(technique.edit(trained(), digits()), "train")


def test_training_recovers_what_few_bits_lose():
    assert learnt(Quantize(weight_bits=2, epochs=5)) >= learnt(Quantize(weight_bits=2)) + 0.02


def test_two_bit_weights_clip_their_largest():
    clipped, whole = Quantize(weight_bits=2), Quantize(weight_bits=2, weight_ranges="minmax")
    assert learnt(clipped) >= learnt(whole) + 0.1


def test_training_helps_power_of_two_int8():
    technique = {"scales": "power_of_two", "granularity": "layer", "ranges": "minmax"}
    assert learnt(Quantize(**technique, epochs=3)) >= learnt(Quantize(**technique))


def test_bias_correction_removes_the_mean_error():
    x = digits().calibration(256, 0)
    with torch.no_grad():
        real = trained()(x)

    def mean_error(flag):
        quantized = Quantize(weight_bits=3, bias_correction=flag).edit(trained(), digits())
        return float((quantized(x) - real).mean(0).abs().mean())

    assert mean_error(True) < 0.5 * mean_error(False)


def test_weight_ranges_shrink_in_training():
    quantized = Quantize().edit(trained(), digits())
    before = quantized.weight_quantizer("head.weight").scale.clone()
    quantized.train()
    with torch.no_grad():
        quantized.model.head.parametrizations.weight.original.mul_(0.25)
    quantized(digits().train.x[:8])
    assert torch.allclose(quantized.weight_quantizer("head.weight").scale, before * 0.25)


# --- the model as an object ---


def test_the_given_model_never_changes():
    before = copy.deepcopy(trained().state_dict())
    Quantize(epochs=1).edit(trained(), digits())
    after = trained().state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_equal_seeds_give_equal_models():
    a, b = (Quantize(weight_bits=4, epochs=1).edit(trained(), digits()).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NETS)
def test_rebuilt_from_its_spec_and_state(name):
    quantized = Quantize(weight_bits=5).edit(net(name), task_of(name))
    spec = json.loads(json.dumps(quantized.spec()))
    x = task_of(name).validation.x[:10]
    for model in (NETS[name](), quantized.model):  # fresh with batch norms, and already parametrised
        again = QuantizedModel.from_spec(model, spec)
        again.load_state_dict(quantized.state_dict(), strict=True)
        assert torch.equal(again(x), quantized(x))
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


def test_a_spec_of_another_class_is_refused():
    spec = Quantize().edit(net("residual"), digits()).spec()
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(StoreError, match="other operators"):
        QuantizedModel.from_spec(other, spec)


@pytest.mark.parametrize("hard", [True, False])
def test_whole_graph_compiles(hard):
    quantized = Quantize().edit(net("odd"), digits())
    quantized.hard = hard
    x = digits().validation.x[:4]
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantized(x))


def test_export_gives_the_soft_form():
    quantized = Quantize().edit(trained(), digits())
    x = digits().validation.x[:4]
    exported = torch.export.export(quantized, (x,)).module()(x)
    quantized.hard = False
    assert torch.equal(exported, quantized(x))


def test_two_outputs_give_a_tuple():
    class Two(Residual):
        def forward(self, x):
            scores = super().forward(x)
            return scores, scores.argmax(1)

    torch.manual_seed(0)
    scores, labels = Quantize().edit(Two().eval(), digits())(digits().validation.x[:9])
    assert torch.equal(scores.argmax(1), labels)


def test_quantised_model_behind_weight_norm():
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    quantized = Quantize().edit(model.eval(), digits())
    x = digits().validation.x[:10]
    graph = capture(quantized, digits().example)
    assert np.array_equal(quantized(x).numpy(), predict(lower(graph), x.numpy()))
