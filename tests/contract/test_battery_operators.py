"""The operator battery: every entry of OPS on its own random examples: torch ~ interpreter == host C."""

import numpy as np
import pytest
from checks import check_macs, check_meaning, check_refuses_what_it_does_not_know, check_same_bytes
from random_graphs import example_inputs

from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.ops import OPS
from thrifty.deploy.run import run

CASES = [(name, kind) for name, op in OPS.items() for kind in op.kinds]
SEEDS = range(12)
IN_C = 3  # of them are compiled as well


def test_every_operator_is_in_the_battery():
    assert {name for name, _ in CASES} == set(OPS)
    assert all(op.name == name and op.kinds for name, op in OPS.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_operator(name, kind):
    meanings = refusals = compiled = calls = 0
    for seed in SEEDS:
        graph = OPS[name].example(np.random.default_rng(seed), kind)
        program = lower(graph)
        calls += sum(call.op == name for call in program.calls)
        x = example_inputs(program, 16, seed)
        y = run(program, x)
        meanings += check_meaning(graph, program, x, y)
        check_macs(graph, program)
        refusals += check_refuses_what_it_does_not_know(graph)
        if seed < IN_C:
            compiled += check_same_bytes(y, run_host(program, x))
    assert meanings == 16 * len(SEEDS)
    assert compiled == 16 * IN_C
    assert refusals >= len(SEEDS)
    assert calls >= len(SEEDS) // 2


def test_examples_are_not_all_alike():
    for name, op in OPS.items():
        shapes = {tuple(n.shape for n in op.example(np.random.default_rng(s), op.kinds[0])) for s in range(20)}
        assert len(shapes) > 5, f"{name}: {shapes}"
