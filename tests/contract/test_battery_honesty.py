"""The honesty battery: parts broken on purpose, on which the checks of the other batteries must fail."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from arithmetic import CRule, on_host
from checks import (
    check_cost_falls,
    check_equal_seeds_give_equal_weights,
    check_hard_torch_is_program,
    check_keeps_the_output_shape,
    check_leaves_the_callers_model_alone,
    check_macs,
    check_meaning,
    check_pair,
    check_plan,
    check_plan_by_running,
    check_refuses_what_it_does_not_know,
    check_round_shift,
    check_same_bytes,
    check_scale,
    check_store_round_trip,
)
from random_graphs import example_inputs
from small import SmallNet, small_task, trained

from thrifty.capture import capture
from thrifty.compress import Prune, Quantize, quantized_model
from thrifty.deploy import lower as lowering
from thrifty.deploy.c import host
from thrifty.deploy.c.host import run_host
from thrifty.deploy.lower import lower
from thrifty.deploy.ops import OPS
from thrifty.deploy.plan import plan
from thrifty.deploy.run import run

INT8 = np.arange(-128, 128, dtype=np.int64)


def red(what, check, *arguments):
    """The check fails with an AssertionError, and nothing else."""
    try:
        check(*arguments)
    except AssertionError:
        return
    pytest.fail(f"the battery stays green: {what}")


@pytest.fixture(scope="module")
def task():
    return small_task()


@pytest.fixture(scope="module")
def net():
    return trained(spare=True)


# arithmetic


def test_floor_instead_of_half_up(tmp_path):
    def floor(text):
        return text.replace("(v + ((int64_t)1 << (shift - 1))) >> shift", "v >> shift")

    sound = on_host(tmp_path)
    assert check_round_shift(sound, INT8, np.arange(8)) == 2048
    (tmp_path / "broken").mkdir()
    broken = on_host(tmp_path / "broken", floor)
    red("C that rounds down", check_round_shift, broken, INT8, np.arange(8))


def test_a_multiplication_that_forgets_its_half():
    broken = CRule(lambda name, v, s, t: ((v.astype(np.int64) << t) * s) >> 32)
    red("C that truncates products", check_scale, broken, INT8 * 1000, np.array([2**30 + 1]), [0])


def test_numpy_that_rounds_ties_to_even():
    """Against the compiled C, a wrong NumPy shows as well."""
    broken = CRule(lambda name, v, s, t: np.rint(v / 2.0**s).astype(np.int64))
    red("ties to even", check_round_shift, broken, INT8, np.arange(1, 8))


# operators


def example(name, kind="int8", fits=lambda call: True):
    """The first example of an operator whose program has a fitting call of it."""
    for seed in range(50):
        graph = OPS[name].example(np.random.default_rng(seed), kind)
        program = lower(graph)
        if any(call.op == name and fits(call) for call in program.calls):
            return graph, program, example_inputs(program, 16, seed)
    raise LookupError(name)


@pytest.mark.parametrize("name", [n for n in OPS if n not in ("argmax", "copy")])
def test_an_interpreter_that_is_wrong_by_one(name, monkeypatch):
    kind = OPS[name].kinds[0]
    graph, program, x = example(name, kind)
    plain = type(OPS[name]).compute

    def wrong(self, call, inputs, out):
        y = plain(self, call, inputs, out)
        return y + 3 * np.ones((), y.dtype) * (np.indices(y.shape).sum(0) % 2).astype(y.dtype)

    sound = run(program, x)
    check_meaning(graph, program, x, sound)
    monkeypatch.setattr(type(OPS[name]), "compute", wrong)
    with np.errstate(over="ignore"):
        broken = run(program, x)
    red(f"{name}: interpreter", check_meaning, graph, program, x, broken)
    red(f"{name}: interpreter against C", check_same_bytes, broken, sound)


def test_c_that_rounds_down(monkeypatch):
    _, program, x = example("avgpool", fits=lambda call: call.attrs["requant"] == "multiplier")
    expected = run(program, x)
    check_same_bytes(expected, run_host(program, x))
    plain, half = host.render, "* multiplier + ((int64_t)1 << 31)) >> 32"

    def floor(*arguments):
        files = plain(*arguments)
        assert half in files["kernels/arith.h"]
        return {**files, "kernels/arith.h": files["kernels/arith.h"].replace(half, "* multiplier) >> 32")}

    monkeypatch.setattr(host, "render", floor)
    red("C kernels that round down", check_same_bytes, expected, run_host(program, x))


def test_c_with_a_wrong_weight(monkeypatch):
    _, program, x = example("linear")
    call = next(c for c in program.calls if c.op == "linear")
    weight = call.constants["weight"].copy()
    weight.flat[0] += 1 if weight.flat[0] < 7 else -1
    wrong = replace(call, constants={**call.constants, "weight": weight})
    other = replace(program, calls=tuple(wrong if c is call else c for c in program.calls))
    red("a weight that is off by one", check_same_bytes, run(program, x), run_host(other, x))


def test_macs_that_forget_a_factor():
    graph, program, _ = example("conv")
    assert check_macs(graph, program) == 1
    calls = tuple(replace(c, macs=c.macs // 2) for c in program.calls)
    red("half of the MACs", check_macs, graph, replace(program, calls=calls))


def test_a_lowering_that_overlooks_attributes(monkeypatch):
    graph, _, _ = example("conv")
    assert check_refuses_what_it_does_not_know(graph) > 0
    monkeypatch.setattr(lowering, "check", lambda _graph: ())
    red("no refusals", check_refuses_what_it_does_not_know, graph)


# memory


def test_plans_that_overlap_or_are_too_small(net, task):
    program = lower(capture(Quantize.example().edit(net, task), task.example))
    made = plan(program)
    x = example_inputs(program, 1, 0)[0]
    assert check_plan(program, made) > 0
    assert check_plan_by_running(program, made, x) > 0
    heap = replace(made, offsets=dict.fromkeys(made.offsets, 0))
    red("everything at offset 0", check_plan, program, heap)
    red("everything at offset 0, run", check_plan_by_running, program, heap, x)
    red("an arena without its end", check_plan, program, replace(made, arena_bytes=made.bound_bytes - 8))
    crooked = {k: v + 4 for k, v in made.offsets.items()}
    red("offsets of 4", check_plan, program, replace(made, offsets=crooked, arena_bytes=made.arena_bytes + 8))


# techniques


@dataclass(frozen=True)
class InPlace:
    """Edits the caller's model."""

    def edit(self, model, task):
        with torch.no_grad():
            model.head.bias += 1
        return model


@dataclass(frozen=True)
class Restless:
    """Leaves the caller's model in another mode."""

    def edit(self, model, task):
        edited = Prune(0.5, recover_epochs=0).edit(model, task)
        model.train(not model.training)
        return edited


@dataclass(frozen=True)
class Random:
    """Reads global randomness."""

    def edit(self, model, task):
        edited = Quantize.example().edit(model, task)
        with torch.no_grad():
            next(edited.parameters()).add_(torch.rand(()))
        return edited


@dataclass(frozen=True)
class Wider:
    """Adds a class."""

    def edit(self, model, task):
        return torch.nn.Sequential(model, torch.nn.ConstantPad1d((0, 1), 0.0))


def test_techniques_that_break_their_contract(net, task):
    red("mutates its argument", check_leaves_the_callers_model_alone, InPlace(), trained(epochs=1), task)
    red("changes the mode", check_leaves_the_callers_model_alone, Restless(), trained(epochs=1), task)
    red("mutates, in a pair", check_pair, Prune(0.5, recover_epochs=0), InPlace(), net, task)
    red("reads global randomness", check_equal_seeds_give_equal_weights, Random(), net, task)
    red("changes the shape", check_keeps_the_output_shape, Wider().edit(net, task), net, task)
    red("costs as much as before", check_cost_falls, net, net, task, "params")


def test_torch_integers_that_are_off_by_one(net, task, monkeypatch):
    edited = Quantize.example().edit(net, task)
    check_hard_torch_is_program(edited, task)
    plain = quantized_model.run_exact
    monkeypatch.setattr(quantized_model, "run_exact", lambda *arguments: plain(*arguments) + 1)
    red("torch computes something else", check_hard_torch_is_program, edited, task)


def test_a_store_that_loses_bits(net, task, tmp_path, monkeypatch):
    import thrifty.store

    edited = Prune(0.5, recover_epochs=0).edit(net, task)
    check_store_round_trip(edited, SmallNet, task, tmp_path / "sound")
    plain = thrifty.store.load

    def lossy(*arguments, **named):
        model = plain(*arguments, **named)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.half().float())
        return model

    monkeypatch.setattr(thrifty.store, "load", lossy)
    red("a store in half precision", check_store_round_trip, edited, SmallNet, task, tmp_path / "broken")
