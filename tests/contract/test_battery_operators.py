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
ran: dict[tuple[str, str], int] = {}


@pytest.fixture(params=CASES, ids="-".join)
def examples(request):
    name, kind = request.param
    graphs = [OPS[name].example(np.random.default_rng(seed), kind) for seed in SEEDS]
    return request.param, [(g, lower(g)) for g in graphs]


def test_operator(examples):
    case, pairs = examples
    assert any(call.op == case[0] for _, program in pairs for call in program.calls)
    total = 0
    for seed, (graph, program) in zip(SEEDS, pairs):
        x = example_inputs(program, 16, seed)
        y = run(program, x)
        total += check_meaning(graph, program, x, y)
        total += check_macs(graph, program)
        total += check_refuses_what_it_does_not_know(graph)
        if seed < IN_C:
            total += check_same_bytes(y, run_host(program, x))
    ran[case] = total


def test_every_operator_ran():
    assert set(ran) == set(CASES)
    assert {name for name, _ in CASES} == set(OPS)
    assert min(ran.values()) >= len(SEEDS) * (16 + 1 + 1) + IN_C * 16


def test_examples_are_not_all_alike():
    for name, op in OPS.items():
        shapes = {tuple(n.shape for n in op.example(np.random.default_rng(s), op.kinds[0])) for s in range(20)}
        assert len(shapes) > 5, f"{name}: {shapes}"
