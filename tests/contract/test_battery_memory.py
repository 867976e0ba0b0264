"""The memory battery: plans of random networks and of the zoo."""

import pytest
from checks import check_plan, check_plan_by_running
from hypothesis import given, settings
from random_graphs import example_inputs, quantised_graphs

from thrifty.capture import capture
from thrifty.deploy.lower import lower
from thrifty.deploy.ops import OPS
from thrifty.deploy.plan import plan
from thrifty.zoo import ZOO, create


def scratch_of(program):
    sizes = {c.name: OPS[c.op].c(c, program).scratch_bytes for c in program.calls}
    return {name: size for name, size in sizes.items() if size}


def test_random_networks():
    ran = []

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(graph=quantised_graphs(layers=10))
    def each(graph):
        program = lower(graph)
        pairs = 0
        for made in (plan(program), plan(program, scratch_of(program))):
            pairs += check_plan(program, made)
            check_plan_by_running(program, made, example_inputs(program, 2, 0)[0])
        ran.append(pairs)

    each()
    assert len(ran) >= 150
    assert sum(ran) > 3000


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo_is_within_five_percent_of_the_bound(name):
    import torch

    model = create(name).eval()
    program = lower(capture(model, torch.zeros(1, *model.input_shape)))
    made = plan(program)
    check_plan(program, made)
    assert made.arena_bytes <= 1.05 * made.bound_bytes
