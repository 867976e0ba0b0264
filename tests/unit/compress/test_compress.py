import copy
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch
from compress_nets import Residual, digits, net, signals, trained
from torch import nn

from thrifty.capture import capture
from thrifty.compress import PARAMETRISATIONS, TECHNIQUES, WRAPPERS, Quantize, Train, compress, label
from thrifty.compress.fold import fold_batch_norms
from thrifty.cost import count
from thrifty.errors import DataError, UnsupportedModel
from thrifty.recipe import Recipe, technique_name
from thrifty.report import Report

# --- folding batch norms ---


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_folding_keeps_the_function_and_the_names():
    model = net("residual")
    x = digits().validation.x[:20]
    before = model(x)
    names = [n for n, _ in model.named_modules()]
    folded = fold_batch_norms(copy.deepcopy(model), digits().example)
    assert torch.allclose(folded(x), before, rtol=1e-4, atol=1e-4)
    assert [n for n, _ in folded.named_modules()] == names
    assert norms(folded) == []
    assert isinstance(folded.bn1, nn.Identity)
    assert folded.conv2.bias is not None
    assert isinstance(folded.late, nn.Conv2d)  # after a ReLU: becomes a depthwise 1x1 convolution
    assert folded.late.groups == 8


def test_a_batch_norm_behind_a_shared_layer_is_not_folded_into_it():
    model = net("signal")
    x = signals().validation.x[:20]
    folded = fold_batch_norms(copy.deepcopy(model), signals().example)
    assert isinstance(folded.norm, nn.Conv1d)
    assert torch.equal(folded.again.weight, model.again.weight)
    with torch.no_grad():
        assert torch.allclose(folded.features(x), model.features(x), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_behind_tied_weights_is_not_folded_into_them():
    a, b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    b.weight = a.weight
    norm = nn.BatchNorm2d(1).eval()
    norm.running_var.fill_(4.0)
    model = nn.Sequential(a, norm, b).eval()
    x = torch.randn(2, 1, 5, 5)
    folded = fold_batch_norms(copy.deepcopy(model), x[:1])
    assert torch.allclose(folded(x), model(x), atol=1e-5)


def test_a_linear_layer_folds_and_a_lonely_norm_over_a_vector_is_refused():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 10)).eval()
    x = digits().validation.x[:20]
    assert torch.allclose(fold_batch_norms(copy.deepcopy(linear), x[:1])(x), linear(x), atol=1e-4)
    lonely = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).eval()
    with pytest.raises(UnsupportedModel, match="1: a batch norm over a vector must follow a Linear"):
        fold_batch_norms(lonely, x[:1])


def test_a_model_without_norms_is_given_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert fold_batch_norms(model, digits().example) is model


# --- compress ---


def test_a_recipe_is_applied_in_order_and_recorded():
    report = Report()
    model = trained()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, Recipe((Train(epochs=1), Quantize(weight_bits=4))), digits(), report)
    assert result.quantized
    assert [row.step for row in report.rows] == ["start", "train 1", "quantize 8"]
    assert report.rows[0].cost == count(capture(model, digits().example))
    assert report.rows[-1].cost.weight_bytes < report.rows[0].cost.weight_bytes / 4
    assert report.rows[-1].score == digits().score(result)
    assert report.rows[-1].knobs["weight_bits"] == 4
    assert report.rows[-1].seconds > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_empty_recipe_gives_a_copy():
    result = compress(trained(), Recipe(), digits())
    assert result is not trained()
    assert torch.equal(result(digits().example), trained()(digits().example))


@dataclass(frozen=True)
class Halve:
    def edit(self, model, task):
        return nn.Sequential(copy.deepcopy(model), nn.Linear(10, 5))


def test_a_step_that_changes_the_output_shape_is_named():
    with pytest.raises(DataError, match=r"halve changed the output from \[\(1, 10\)\] to \[\(1, 5\)\]"):
        compress(trained(), Recipe((Halve(),)), digits())


# --- the tables ---


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_is_a_frozen_dataclass_with_an_example(name):
    kind = TECHNIQUES[name]
    example = kind.example()
    assert is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert technique_name(example) == name
    assert label(example).split()[0] == name
    assert all(f.init for f in fields(kind))
    text = Recipe((example,)).to_toml()
    assert Recipe.from_toml(text, TECHNIQUES).steps == (example,)


def test_the_tables_for_storing_name_their_classes():
    for table in (WRAPPERS, PARAMETRISATIONS):
        for name, kind in table.items():
            assert kind.__name__ == name
            assert callable(kind.spec)
            assert callable(kind.from_spec)


def test_the_wrapped_model_has_no_norms_left():
    assert norms(Quantize().edit(Residual().eval(), digits())) == []
