"""What the batteries assert, as plain functions that return how many cases they ran.

The honesty battery calls the same functions on parts that are broken on purpose, and expects them to fail.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
import torch_reference

from thrifty import arith
from thrifty.capture import capture
from thrifty.cost import count
from thrifty.deploy import lower as lowering
from thrifty.deploy.ops import OPS
from thrifty.deploy.run import predict, quantize_input, run
from thrifty.errors import Incompatible, NothingToDo
from thrifty.graph import ACTIVATIONS

# arithmetic


def check_round_shift(rule: Callable, values: np.ndarray, shifts: np.ndarray) -> int:
    """C rounds like arith.round_shift, where the result fits int32."""
    return _check_shift(rule, "round", arith.round_shift, values, shifts)


def check_floor_shift(rule: Callable, values: np.ndarray, shifts: np.ndarray) -> int:
    """C rounds down like arith.floor_shift."""
    return _check_shift(rule, "floor", arith.floor_shift, values, shifts)


def _check_shift(rule: Callable, name: str, meaning: Callable, values: np.ndarray, shifts: np.ndarray) -> int:
    cases = 0
    for shift in shifts.tolist():
        expected = meaning(values.astype(np.int64), shift)
        assert np.abs(expected).max() < 2**31, "the caller asks for more than int32 holds"
        np.testing.assert_array_equal(rule(name, values, shift), expected, err_msg=f"{name} shift by {shift}")
        cases += len(values)
    return cases


def check_scale(rule: Callable, acc: np.ndarray, multipliers: np.ndarray, pre_shifts: Iterable[int]) -> int:
    """C multiplies like arith.scale_by, where acc << pre_shift fits int32."""
    cases = 0
    for pre_shift in pre_shifts:
        small = acc[np.abs(acc) < 2 ** (31 - pre_shift)] if pre_shift else acc
        for multiplier in multipliers.tolist():
            expected = arith.scale_by(small.astype(np.int64), multiplier, pre_shift)
            got = rule("scale", small, multiplier, pre_shift)
            np.testing.assert_array_equal(got, expected, err_msg=f"times {multiplier}, shifted by {pre_shift}")
            cases += len(small)
    return cases


def check_clamp(rule: Callable, values: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> int:
    """C saturates like arith.saturate."""
    cases = 0
    for low in lows.tolist():
        for high in highs[highs >= low].tolist():
            expected = arith.saturate(values, low, high)
            np.testing.assert_array_equal(rule("clamp", values, low, high), expected, err_msg=f"{low}..{high}")
            cases += len(values)
    return cases


# operators


def check_meaning(graph, program, inputs: np.ndarray, outputs: np.ndarray) -> int:
    """The program's outputs are those of the same network in torch, in real numbers, to within the stated error."""
    expected = torch_reference.outputs(graph, inputs)
    assert outputs.shape == expected.shape
    if graph[graph.outputs[0]].op == "argmax":
        np.testing.assert_array_equal(outputs, expected)
    elif program.buffers[program.output].dtype == "float32":
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    else:
        units = np.abs(outputs.astype(np.int64) - expected)
        assert units.max() <= torch_reference.allowed_units(graph), f"{units.max()} units away"
    return len(outputs)


def check_macs(graph, program) -> int:
    """Counted multiply-accumulates are the product of the shapes, in the graph and in the program."""
    by_hand = alone = 0
    for node in graph:
        if node.op in ("conv", "linear"):
            by_hand += math.prod(node.shape[1:]) * node.constants["weight"].size
        alone += node.size if node.op == "batchnorm" else 0
    assert count(graph).macs == program.macs
    assert by_hand <= program.macs <= by_hand + alone  # a batch norm that cannot fold multiplies each element
    return 1


def check_refuses_what_it_does_not_know(graph) -> int:
    """An attribute that no operator lists, and an unknown operator, are refused with the module path."""
    cases = 0
    for node in (n for n in graph if n.op != "input"):
        wrong = [("op", "aten.erf.default", replace(node, op="aten.erf.default", module="a.b"))]
        if node.op not in ACTIVATIONS:  # these vanish into their producers, and have no attributes
            strange = replace(node, attrs={**node.attrs, "surprise": 1}, module="a.b")
            wrong.append(("attribute", "surprise", strange))
        for kind, word, changed in wrong:
            found = lowering.check(graph.with_nodes({node.name: changed}))
            assert any(word in r and "a.b" in r for r in found), f"{kind} of {node.op}: {found}"
            cases += 1
    return cases


def check_same_bytes(expected: np.ndarray, got: np.ndarray) -> int:
    """Two engines gave the same bytes."""
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    return len(expected)


# the memory plan


def check_plan(program, plan) -> int:
    """No two live buffers share a byte, but for operators that work in place; the arena holds them all."""
    needs = {
        **{n: b.size_bytes for n, b in program.buffers.items()},
        **{n: plan.sizes[n] for n in plan.offsets},
    }
    lives = lives_of(program)
    lives |= {c.name: (i, i) for i, c in enumerate(program.calls) if c.name in plan.offsets and c.name not in lives}
    assert set(plan.offsets) == set(lives)
    shared = in_place_pairs(program, lives)
    names, pairs = sorted(lives), 0
    for i, a in enumerate(names):
        assert plan.offsets[a] % 8 == 0
        assert 0 <= plan.offsets[a] <= plan.arena_bytes - needs[a]
        for b in names[i + 1 :]:
            together = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            apart = plan.offsets[a] + needs[a] <= plan.offsets[b] or plan.offsets[b] + needs[b] <= plan.offsets[a]
            assert apart or not together or frozenset((a, b)) in shared, f"{a} and {b} overlap while both are alive"
            pairs += 1
    assert plan.arena_bytes >= plan.bound_bytes >= max(needs.values(), default=0)
    return pairs + len(names)


def lives_of(program) -> dict[str, tuple[int, int]]:
    """Return the first and last call at which each buffer holds something that matters."""
    lives = {program.input: (0, 0)}
    for i, call in enumerate(program.calls):
        for name in call.inputs:
            lives[name] = (lives[name][0], i)
        lives[call.output] = (i, i)
    lives[program.output] = (lives[program.output][0], max(0, len(program.calls) - 1))
    return lives


def in_place_pairs(program, lives) -> set[frozenset[str]]:
    """Return the pairs (input, output) of operators that may overwrite an input, which dies there."""
    found = set()
    for i, call in enumerate(program.calls):
        for k in OPS[call.op].in_place(call):
            if lives[call.inputs[k]][1] == i and call.inputs[k] != program.output:
                found.add(frozenset((call.inputs[k], call.output)))
    return found


def check_plan_by_running(program, plan, example: np.ndarray) -> int:
    """The program gives its outputs when its buffers really lie where the plan says, in one arena full of rubbish."""
    rng = np.random.default_rng(0)
    arena = rng.integers(0, 256, plan.arena_bytes, dtype=np.uint8)

    def at(name: str) -> np.ndarray:
        buffer = program.buffers[name]
        return (
            arena[plan.offsets[name] : plan.offsets[name] + buffer.size_bytes].view(buffer.dtype).reshape(buffer.shape)
        )

    at(program.input)[...] = example
    for call in program.calls:
        inputs = [at(name)[None].copy() for name in call.inputs]
        result = OPS[call.op].compute(call, inputs, program.buffers[call.output])
        if call.name in plan.offsets:
            start = plan.offsets[call.name]
            arena[start : start + plan.sizes[call.name]] = 0x5A
        at(call.output)[...] = result[0]
    np.testing.assert_array_equal(at(program.output), run(program, example[None])[0])
    return len(program.calls)


# techniques


def bits_of(model) -> dict[str, bytes]:
    """Return every tensor of a model, bit for bit, and which modules are training."""
    state = {k: v.detach().cpu().contiguous().numpy().tobytes() for k, v in model.state_dict().items()}
    return state | {f"{k}.training": bytes([m.training]) for k, m in model.named_modules()}


def check_leaves_the_callers_model_alone(technique, model, task) -> int:
    """`edit` changes a copy: every bit, every shape and every mode of the given model stays."""
    for mode in (False, True):
        model.train(mode)
        before = bits_of(model)
        edited = technique.edit(model, task)
        assert bits_of(model) == before, "the caller's model was changed"
        assert edited is not model
        mine = {id(t) for t in (*edited.parameters(), *edited.buffers())}
        assert not mine & {id(t) for t in (*model.parameters(), *model.buffers())}, "tensors are shared"
    model.eval()
    return 2


def check_keeps_the_output_shape(edited, model, task) -> int:
    """Same output shape and type; finite numbers."""
    x = task.validation.x[:5]
    with torch.no_grad():
        before, after = model(x), edited(x)
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert torch.isfinite(after).all()
    return 1


def check_cost_falls(edited, model, task, what: str | None) -> int:
    """The cost that the technique declares falls, counted on the captured graph."""
    if what is None:
        return 0
    before, after = (getattr(count(capture(m, task.example)), what) for m in (model, edited))
    assert after < before, f"{what}: {before} -> {after}"
    return 1


def check_equal_seeds_give_equal_weights(technique, model, task) -> int:
    """Two edits give the same bits; nothing global is read."""
    torch.manual_seed(1)
    first = bits_of(technique.edit(model, task))
    torch.manual_seed(2)
    np.random.default_rng().random()
    assert bits_of(technique.edit(model, task)) == first
    return 1


def check_store_round_trip(edited, fresh, task, folder) -> int:
    """Saved and loaded into a new instance, it computes the same bits and has the same program."""
    from thrifty.store import load, save

    save(edited, folder)
    loaded = load(folder, fresh)
    x = task.validation.x
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), edited.eval()(x))
    programs = [lowering.lower(capture(m, task.example)) for m in (edited, loaded)]
    stored = quantize_input(programs[0], x.numpy())
    np.testing.assert_array_equal(*(run(p, stored) for p in programs))
    return 1


def check_exports_and_compiles(edited, task) -> int:
    """torch.export reads it, and torch.compile finds one graph without a break."""
    torch.export.export(copy.deepcopy(edited), (task.example,))
    soft = copy.deepcopy(edited)
    if getattr(soft, "quantized", False):
        soft.hard = False
    torch.compiler.reset()
    compiled = torch.compile(soft, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(task.example), soft(task.example))
    return 1


def check_hard_torch_is_program(edited, task) -> int:
    """What torch computes after the technique is what the program computes: every byte for integers."""
    program = lowering.lower(capture(edited, task.example))
    x = task.validation.x
    with torch.no_grad():
        mine = edited(x).numpy()
    theirs = predict(program, x.numpy())
    if program.buffers[program.output].dtype == "float32":
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    else:
        np.testing.assert_array_equal(mine, theirs)
    return len(x)


def check_pair(first, second, model, task) -> str:
    """One technique after the other works, or says that it does not go with it, or that nothing is left to do."""
    edited = first.edit(model, task)
    before = bits_of(edited)
    both, refusal = edited, None
    try:
        both = second.edit(edited, task)
    except (Incompatible, NothingToDo) as err:
        refusal = err
    assert bits_of(edited) == before, "the caller's model was changed"
    if refusal is not None:
        assert len(str(refusal)) > 20, "a refusal says why"
        return type(refusal).__name__
    check_keeps_the_output_shape(both, model, task)
    check_hard_torch_is_program(both, task)
    return "works"
