"""Every byte equal on the zoo: torch's hard model, the program, C on this computer, an emulated Cortex-M4.

Without files: every family with random weights and noise, and LeNet on real digits. With THRIFTY_DATA: trained
networks on real examples. `experiments/parity.py` runs a thousand examples of each on every core and compiler.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import check_same_bytes

from thrifty.capture import capture
from thrifty.compress import Quantize
from thrifty.data import load_task
from thrifty.deploy.c.build import build
from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.emulate import emulate
from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.run import predict, quantize_input, run
from thrifty.task import Task
from thrifty.zoo import ZOO, create

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = {  # options that keep an untrained network small enough for a test
    "ds-cnn": {"filters": 16},
    "mobilenet-v1": {"input_shape": (3, 32, 32)},
    "preact-resnet-18": {"input_shape": (3, 16, 16), "filters": 4},
    "resnet-8": {"input_shape": (3, 16, 16), "filters": 8},
    "wide-resnet": {"input_shape": (3, 16, 16), "depth": 10, "width": 0.5},
}
have = pytest.mark.skipif(not os.environ.get("THRIFTY_DATA"), reason="THRIFTY_DATA is not set")


def noise_task(model, n=40):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (n, *model.input_shape)).astype(np.float32)
    with torch.no_grad():
        shape = model(torch.from_numpy(x[:1])).shape
    y = np.arange(n) % shape[1] if shape[1] < 100 else rng.normal(0, 1, (n, shape[1])).astype(np.float32)
    return Task.from_arrays(x, y, validation=0.2, test=0.2, name="noise")


def settle(model, x):
    """Give batch norms the statistics of the data."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


def equal_everywhere(hard, x, folder, on_target) -> dict[str, int]:
    """Return how many examples each engine ran; every byte is equal."""
    program = lower(capture(hard, x[:1]))
    with torch.no_grad():
        mine = torch.cat([hard(part) for part in x.split(100)]).numpy()
    ran = {"torch": check_same_bytes(mine, predict(program, x.numpy()))}
    stored = quantize_input(program, x.numpy())
    expected = run(program, stored)
    ran["host C"] = check_same_bytes(expected, run_host(program, stored))
    image = build(emit(program, folder / "c"), "cortex-m4")
    got = emulate(image, stored[:on_target], count=False).outputs
    ran["cortex-m4"] = check_same_bytes(expected[:on_target], got)
    return ran


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 8) for name in sorted(ZOO)), ("resnetv1-6", 16), ("ds-cnn", 16), ("lenet", 16)]
)
def test_untrained(name, bits, tmp_path):
    torch.manual_seed(0)
    model = create(name, **SMALL.get(name, {}))
    task = noise_task(model.eval())
    settle(model, task.train.x)
    hard = Quantize(bits=bits, calibration_samples=16).edit(model, task)
    ran = equal_everywhere(hard, task.train.x[:8], tmp_path, on_target=2)
    assert ran == {"torch": 8, "host C": 8, "cortex-m4": 2}


def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    task = load_task("digits")
    model = create("lenet")
    task.fit(model, epochs=1, lr=0.05)
    hard = Quantize(weight_bits=4).edit(model, task)
    ran = equal_everywhere(hard, torch.cat([task.test.x, task.train.x])[:1000], tmp_path, on_target=100)
    assert ran == {"torch": 1000, "host C": 1000, "cortex-m4": 100}


@have
@pytest.mark.data
@pytest.mark.parametrize(
    ("weights", "quantize", "examples", "on_target"),
    [
        ("har_resnetv1_6_16", Quantize(bits=8), 1000, 100),
        ("har_resnetv1_6_16", Quantize.microai(16), 200, 20),
        ("spoken_resnetv1_6_16", Quantize.microai(8), 1000, 100),
        ("spoken_ds_cnn", Quantize(bits=8, weight_bits=4), 80, 5),
        ("spoken_autoencoder", Quantize(bits=8), 1000, 20),
    ],
)
def test_trained_on_real_examples(weights, quantize, examples, on_target, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    from train import task_named, trained

    task = task_named(weights)
    x = torch.cat([task.test.x, task.validation.x, task.train.x])[:examples]
    ran = equal_everywhere(quantize.edit(trained(weights), task), x, tmp_path, on_target)
    assert ran == {"torch": examples, "host C": examples, "cortex-m4": on_target}
