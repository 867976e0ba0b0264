"""Every byte equal: torch's hard model, the program, C on this computer, and emulated Cortex-M0+, M4 and M7."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checks import check_same_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_nets import RandomNet, random_task
from random_graphs import example_inputs, quantised_graphs

from thrifty.capture import capture
from thrifty.compress import Quantize
from thrifty.deploy.c.build import build
from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.emulate import emulate
from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.run import predict, quantize_input, run
from thrifty.errors import ThriftyError

CORES = ("cortex-m4", "cortex-m0plus", "cortex-m7")
fixed = {"deadline": None, "derandomize": True}


def test_program_is_host_c():
    ran = []

    @settings(max_examples=60, **fixed)
    @given(graph=quantised_graphs(layers=8), seed=st.integers(0, 99))
    def each(graph, seed):
        program = lower(graph)
        x = example_inputs(program, 12, seed)
        ran.append(check_same_bytes(run(program, x), run_host(program, x, flags=("-O1",))))

    each()
    assert sum(ran) >= 60 * 12


def test_host_c_has_no_undefined_behaviour():
    ran = []

    @settings(max_examples=6, **fixed)
    @given(graph=quantised_graphs(layers=8))
    def each(graph):
        program = lower(graph)
        x = example_inputs(program, 6, 1)
        ran.append(check_same_bytes(run(program, x), run_host(program, x, sanitize=True)))

    each()
    assert sum(ran) >= 6 * 6


@pytest.mark.parametrize("core", CORES)
def test_program_is_every_core(core, tmp_path_factory):
    ran = []

    @settings(max_examples=12, **fixed)
    @given(graph=quantised_graphs(layers=10))
    def each(graph):
        program = lower(graph)
        x = example_inputs(program, 4, 2)
        folder = emit(program, tmp_path_factory.mktemp("c") / "c")
        got = emulate(build(folder, core), x, count=False).outputs
        ran.append(check_same_bytes(run(program, x), got))

    each()
    assert sum(ran) >= 12 * 4


SCHEMES = (
    Quantize(bits=8),
    Quantize(bits=8, scales="power_of_two", granularity="layer"),
    Quantize(bits=8, weight_bits=4),
    Quantize(bits=16),
    Quantize(bits=16, scales="power_of_two", granularity="layer"),
    Quantize.microai(8),
    Quantize.microai(8, rounding="floor"),
    Quantize.microai(16),
    Quantize(bits=6, weight_bits=3),
    Quantize(bits=12, unsigned=False),
)


@pytest.mark.parametrize("seed", range(20))
def test_torch_is_program_is_c(seed):
    """Random networks, every scheme of quantisation in turn; some trained with rounding first."""
    model = RandomNet(seed)
    scheme = replace(SCHEMES[seed % len(SCHEMES)], calibration_samples=16)
    if seed % 7 == 3:
        scheme = replace(scheme, epochs=1)
    task = random_task(model)
    if model.softmax and scheme.bits > 8:
        with pytest.raises(ThriftyError, match="softmax"):  # it has no 16-bit form
            scheme.edit(model, task)
        return
    hard = scheme.edit(model, task)
    program = lower(capture(hard, task.example))
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1.5, (24, *model.input_shape)).astype(np.float32)
    with torch.no_grad():
        mine = hard(torch.from_numpy(x)).numpy()
    check_same_bytes(mine, predict(program, x))
    stored = quantize_input(program, x)
    assert check_same_bytes(run(program, stored), run_host(program, stored, flags=("-O1",))) == 24
