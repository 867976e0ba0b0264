import copy

import pytest
import torch
from compress_nets import Residual, digits, trained

from thrifty.compress import Quantize, Train
from thrifty.compress.train import fine_tune
from thrifty.errors import KnobError


def fresh():
    torch.manual_seed(0)
    return Residual()


def test_a_copy_is_trained_and_the_given_model_stays():
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    result = Train(epochs=2, lr=0.05).edit(model, digits())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert digits().score(result) > digits().score(model) + 0.2
    assert not result.training


def test_equal_seeds_give_equal_weights():
    a, b = (Train(epochs=1).edit(fresh(), digits()).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_knobs_are_refused_all_at_once():
    with pytest.raises(KnobError, match=r"optimizer is 'adam'.*lr is -1|lr is -1.*optimizer is 'adam'"):
        Train(optimizer="adam", lr=-1)
    with pytest.raises(KnobError, match=r"Train\.epochs is 0"):
        Train(epochs=0)


@pytest.mark.parametrize("knobs", [{"batch": "a"}, {"epochs": 1.5}, {"epochs": "3"}, {"milestones": 3}, {"flip": 2}])
def test_values_of_the_wrong_type_are_refused_in_words(knobs):
    ((name, value),) = knobs.items()
    with pytest.raises(KnobError, match=f"Train: {name} is {value!r}; it must be"):
        Train(**knobs)


def test_a_quantised_model_trains_on_and_stays_quantised():
    quantized = Quantize(weight_bits=3, weight_ranges="minmax").edit(trained(), digits())
    before = {k: v.clone() for k, v in quantized.state_dict().items()}
    result = Train(epochs=3, lr=0.005).edit(quantized, digits())
    assert digits().score(result, "train") > digits().score(quantized, "train")
    assert all(torch.equal(before[k], v) for k, v in quantized.state_dict().items())
    changed = {k for k, v in result.state_dict().items() if not torch.equal(before[k], v)}
    assert "model.conv1.parametrizations.weight.0.scale" in changed
    assert not any(k.startswith("points.") for k in changed)  # activation ranges stay


def test_the_last_fifth_of_the_epochs_trains_on_the_exact_integers(monkeypatch):
    quantized = Quantize().edit(trained(), digits())
    stages = []
    fit = type(digits()).fit

    def watched(task, model, before_epoch, **knobs):
        def both(epoch, trained_model):
            before_epoch(epoch, trained_model)
            stages.append(trained_model.training_hard)

        return fit(task, model, before_epoch=both, **knobs)

    monkeypatch.setattr(type(digits()), "fit", watched)
    fine_tune(quantized, digits(), {"epochs": 11, "lr": 1e-4, "batch": 1169})
    assert stages == [False] * 9 + [True] * 2
    assert not quantized.training_hard


def test_hard_training_gives_the_exact_values_and_the_gradients_of_the_soft_form():
    quantized = Quantize(bits=4).edit(trained(), digits())
    x, y = digits().train.x[:16], digits().train.y[:16]
    exact = quantized(x)
    quantized.train()
    quantized.training_hard = True
    out = quantized(x)
    assert torch.allclose(out, exact, rtol=0, atol=1e-6)
    torch.nn.functional.cross_entropy(out, y).backward()
    grads = {n: p.grad for n, p in quantized.named_parameters()}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads.values())
    assert float(grads["model.conv1.parametrizations.weight.original"].abs().sum()) > 0
