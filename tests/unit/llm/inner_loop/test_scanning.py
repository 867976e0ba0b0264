"""The scan compares every plan with the model itself; trajectories measure what the states do."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from tiny_llms import FAMILIES, tiny, tokens

from thrifty.errors import DataError, Incompatible, KnobError, StoreError
from thrifty.llm.families import parts_of
from thrifty.llm.inner_loop import MODES, Plan, bootstrap, likelihood, loop, plane, ranges, scan, trajectory
from thrifty.llm.loading import Encoded, collate


def data(rows=12, length=9, seed=0):
    encoded = [Encoded(tuple(r), start=3) for r in tokens(rows, length, seed).tolist()]
    return [collate(encoded[i : i + 4]) for i in range(0, rows, 4)]


def test_differences_are_paired_and_match_a_plain_loop():
    model = tiny("llama", scale=2.0)
    found = scan(model, data(), ranges(4, longest=2), stop=None)
    assert len(found.cells) == 7
    cell = found.cells[3]
    with torch.no_grad():
        base = torch.cat([likelihood(model, b) for b in data()])
        with loop(model, cell.plan):
            with_loop = torch.cat([likelihood(model, b) for b in data()])
    assert np.allclose(cell.differences, (with_loop - base).double().numpy(), atol=1e-6)
    assert cell.low <= cell.mean <= cell.high
    assert found.matrix()[cell.plan.start, cell.plan.end - 1] == cell.mean
    assert np.isnan(found.matrix()[2, 0])
    assert found.best().mean == max(c.mean for c in found.cells)
    assert found.to_svg().count("<rect") == 7
    assert json.loads(json.dumps(found.to_json()))["examples"] == 12


def test_harmful_plans_stop_early_and_the_rest_does_not():
    model = tiny("llama")
    harmful = {0}

    def score(m, batch):
        handle = getattr(m, "_thrifty_inner_loop", None)
        worse = handle is not None and handle.plan.start in harmful
        return torch.linspace(0, 1, len(batch)) - (5.0 if worse else 0.0)

    found = scan(model, data(), [Plan(0, 1, 2), Plan(1, 2, 2)], score=score)
    assert [c.stopped for c in found.cells] == [True, False]
    assert [len(c.differences) for c in found.cells] == [8, 12]
    assert 'stroke="#444"' in found.to_svg()


def test_a_scan_goes_on_from_its_state(tmp_path):
    model, plans, asked = tiny("qwen2"), ranges(4, longest=1, passes=3), []

    def score(m, batch):
        asked.append(1)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return likelihood(m, batch)

    with pytest.raises(KeyboardInterrupt):
        scan(model, data(), plans, score=score, stop=None, state=tmp_path / "s.json")
    assert not hasattr(model, "_thrifty_inner_loop")
    done = len(asked)
    again = scan(model, data(), plans, score=score, stop=None, state=tmp_path / "s.json")
    assert len(asked) - done == 3 * 3  # base and the first plan are kept; three plans of three batches are left
    fresh = scan(tiny("qwen2"), data(), plans, stop=None)
    assert all(np.array_equal(a.differences, b.differences) for a, b in zip(again.cells, fresh.cells, strict=True))
    with pytest.raises(StoreError, match="other data"):
        scan(model, data(seed=1), plans, state=tmp_path / "s.json")
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(StoreError, match="no state"):
        scan(model, data(), plans, state=tmp_path / "s.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_gives_the_same_bits_and_runs_fewer_blocks(family, monkeypatch):
    model, ran = tiny(family), []
    plans = [Plan(1, 3, 2 + (m == "uniform"), m) for m in (MODES if family == "llama" else ("uniform", "damped"))]
    plans += [Plan(0, 2, 2, "reference", "boundary"), *(Plan(s, s + 2, 2, kv_mode="first_pass") for s in (0, 2))]
    attention = type(parts_of(model).attention(0))
    inner = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *a, **k: (ran.append(1), inner(self, *a, **k))[1])
    plain = scan(model, data(), plans, stop=None)
    whole = len(ran)
    found = scan(model, data(), plans, stop=None, reuse=True)
    assert len(ran) - whole < 0.8 * whole
    assert all(np.array_equal(a.differences, b.differences) for a, b in zip(plain.cells, found.cells, strict=True))
    assert scan(model, data(), plans[:2], stop=None).cells[1].mean == found.cells[1].mean  # nothing is left behind


def test_reuse_needs_the_same_calls():
    def score(m, batch):
        looped = hasattr(m, "_thrifty_inner_loop")
        values = likelihood(m, batch)
        return likelihood(m, batch) if looped else values  # a second call

    with pytest.raises(Incompatible, match="another way"):
        scan(tiny("llama"), data(), [Plan(1, 2, 2)], score=score, reuse=True)


def test_bad_requests():
    with pytest.raises(DataError, match="no examples"):
        scan(tiny("llama"), [], [])
    with pytest.raises(KnobError, match="the model has blocks"):
        scan(tiny("llama"), data(), [Plan(3, 5, 2)])
    with pytest.raises(DataError, match="not finite"):
        scan(tiny("llama"), data(), [], score=lambda m, b: torch.full((len(b),), float("nan")))
    for longest in (0, 1.5):
        with pytest.raises(KnobError, match="longest"):
            ranges(4, longest=longest)
    strange = [collate([Encoded((3, 500, 4))])]
    with pytest.raises(DataError, match=r"from 3 to 500; the model has 0\.\.96"):
        scan(tiny("llama"), strange, [])
    with pytest.raises(DataError, match="another model's tokenizer"):
        trajectory(tiny("llama"), strange[0])


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        low, high = bootstrap(rng.normal(0.3, 1.0, 40), seed=i, draws=400)
        inside += low <= 0.3 <= high
    assert 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5 - 0.02 <= inside / 200 <= 1.0


def test_trajectory_measures_are_those_of_the_states():
    model = tiny("gemma2")
    batch = data()[0]
    found = trajectory(model, batch)
    with torch.no_grad():
        out = model(batch.ids, output_hidden_states=True)
    states = [s[:, :-1][batch.learned[:, 1:]] for s in out.hidden_states]
    assert np.allclose(found.norm[2], states[2].norm(dim=-1).mean())
    step = ((states[2] - states[1]).norm(dim=-1) / states[1].norm(dim=-1)).mean()
    assert np.allclose(found.step[1], step, rtol=1e-5)
    assert found.divergence[-1] == pytest.approx(0.0, abs=1e-5)  # the lens on the last state is the model
    assert found.agreement[-1] == 1.0
    assert found.divergence[0] > 0.01
    assert found.blocks == (0, 1, 2, 3)
    assert json.loads(json.dumps(found.to_json()))["blocks"] == [0, 1, 2, 3]


def test_trajectory_of_a_loop_and_its_contraction():
    model = tiny("llama")
    batch = data()[0]
    base, looped = trajectory(model, batch), trajectory(model, batch, Plan(1, 3, 4, "naive"))
    assert looped.blocks == (0, 1, 2, 1, 2, 1, 2, 1, 2, 3)
    assert len(looped.step) == 10
    assert np.allclose(looped.norm[:4], base.norm[:4])
    with loop(model, Plan(1, 3, 4, "naive")), torch.no_grad():
        h = model(batch.ids, output_hidden_states=True).hidden_states
    ends = [h[i][:, :-1][batch.learned[:, 1:]] for i in (3, 5, 7, 9)]
    moves = [(b - a).norm(dim=-1) for a, b in itertools.pairwise(ends)]
    assert np.allclose(looped.contraction, [(moves[1] / moves[0]).mean(), (moves[2] / moves[1]).mean()], rtol=1e-4)
    flat = plane(base, looped)
    assert flat[0].shape == (4, 5, 2)
    assert flat[1].shape == (4, 11, 2)
    assert np.allclose(flat[0][:, :4], flat[1][:, :4], atol=1e-4)
    assert len(parts_of(model).blocks) == 4
    with loop(model, Plan(0, 1, 2)), pytest.raises(KnobError, match="looped already"):
        trajectory(model, batch)
