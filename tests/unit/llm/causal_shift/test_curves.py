"""Lens curves: what they count, the lens itself, the transition and its interval, controls, the trace page."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llms import FAMILIES, tiny, tokens

from thrifty.errors import DataError, KnobError
from thrifty.llm.causal_shift import crossing_of, curves, trace
from thrifty.llm.families import parts_of
from thrifty.llm.loading import Batch, Encoded, collate


def texts(rows=6, length=12, seed=0):
    return [collate([Encoded(tuple(r)) for r in tokens(rows, length, seed).tolist()])]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_depth_is_the_model(family):
    found = curves(tiny(family), texts())
    assert found.mean("self_match")[-1] == 1.0
    assert found.mean("divergence")[-1] == pytest.approx(0.0, abs=1e-5)
    assert (found.mean("divergence")[:-1] > 1e-3).all()
    assert found.depths == 5


def test_measures_match_a_loop_over_positions():
    model = tiny("gemma2")
    parts, batch = parts_of(model), texts(2, 8)[0]
    found = curves(model, [batch], skip=2)
    with torch.no_grad():
        raw = model(batch.ids, output_hidden_states=True).hidden_states[3]
        decoded = parts.logits(raw).argmax(-1)
    table = parts.embedding.weight.detach()
    hits, cosines, projections = [], [], []
    for row in range(2):
        for t in range(2, 7):
            x, y = batch.ids[row, t], batch.ids[row, t + 1]
            if x != y:
                hits.append(float(decoded[row, t] == y))
                cosines.append(float(torch.cosine_similarity(raw[row, t], table[y], dim=0)))
                projections.append(float(raw[row, t] @ table[x] / table[x].norm()))
    assert found.mean("output_match")[3] == pytest.approx(np.mean(hits))
    assert found.mean("cosine_out")[3] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found.mean("projection_in")[3] == pytest.approx(np.mean(projections), rel=1e-4)
    assert found.counts.sum() == len(hits)


def test_depth_zero_of_a_tied_model_decodes_to_the_input():
    model = tiny("llama", vocabulary=97, width=64)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    found = curves(model, texts())
    assert found.tied
    assert found.mean("input_match")[0] == 1.0
    assert found.mean("cosine_in")[0] == pytest.approx(1.0, abs=1e-5)
    assert found.mean("random_match")[0] < 0.2
    assert not curves(tiny("qwen2"), texts()).tied


def test_blocks_that_do_nothing_have_no_transition():
    model = tiny("llama", width=64)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    found = curves(model, texts())
    assert (found.mean("input_match") == found.mean("input_match")[0]).all()
    shift = found.transition()
    assert (shift.depth, shift.crossing, shift.low, shift.never) == (None, None, None, 1.0)


def test_repeated_tokens_padding_and_first_positions_are_left_out_and_counted():
    same = Batch(torch.full((2, 6), 7), torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(DataError, match="next token is the same: 10"):
        curves(tiny("llama"), [same])
    batch = collate([Encoded((0, 5, 5, 6, 7, 8)), Encoded((9, 10, 11))], pad=2)
    found = curves(tiny("llama"), [batch])
    assert found.excluded == {
        "last or padding": 2 + 3, "not to be predicted": 0, "among the first": 0, "beginning of text": 1,
        "next token is the same": 1,
    }  # fmt: skip
    assert found.counts.tolist() == [3, 2]
    assert curves(tiny("llama"), [batch], skip=3).counts.tolist() == [2, 0]
    asked = curves(tiny("llama"), [collate([Encoded((3, 5, 6, 7, 8), start=3)])])
    assert (asked.counts.tolist(), asked.excluded["not to be predicted"]) == ([2], 2)
    with pytest.raises(DataError, match="no texts"):
        curves(tiny("llama"), [])
    with pytest.raises(KnobError, match="skip"):
        curves(tiny("llama"), [batch], skip=-1)


def test_padding_does_not_change_a_sequence():
    model, rows = tiny("llama"), tokens(2, 9).tolist()
    alone = curves(model, [collate([Encoded(tuple(rows[0]))])])
    padded = curves(model, [collate([Encoded(tuple(rows[0])), Encoded((*rows[1], 4, 5, 6, 8))], pad=2)])
    for name in ("cosine_out", "norm", "entropy"):
        assert np.allclose(alone.values[name][:, 0], padded.values[name][:, 0], atol=1e-5)


def test_crossing():
    assert crossing_of(np.array([1.0, 2.0])) == (0, 0.0)
    assert crossing_of(np.array([-1.0, 3.0, -1.0, 1.0])) == (3, 2.5)  # it must stay so
    assert crossing_of(np.array([-1.0, 1.0, -1.0])) == (None, None)
    assert crossing_of(np.array([-3.0, 1.0])) == (1, 0.75)


def test_transition_interval_holds_the_crossing_of_a_planted_shift():
    found = curves(tiny("llama"), texts(40, 12))
    rng = np.random.default_rng(0)
    depth = np.arange(5.0)[:, None]
    centre = 2.3 + 0.4 * rng.standard_normal(40)
    values = {**found.values, "input_match": 0.5 - 0.1 * (depth - centre), "output_match": 0.5 + 0.1 * (depth - centre)}
    shift = replace(found, values=values).transition()
    true = float((centre * found.counts).sum() / found.counts.sum())
    assert shift.depth == 3
    assert shift.crossing == pytest.approx(true, abs=1e-6)
    assert shift.low < true < shift.high
    assert shift.high - shift.low == pytest.approx(2 * 1.96 * 0.4 / 40**0.5, rel=0.35)
    with pytest.raises(KnobError, match="kind"):
        found.transition("norm")


def test_plain_data():
    found = curves(tiny("gpt2"), texts())
    data = json.loads(json.dumps(found.to_json()))
    assert set(data["transitions"]) == {"match", "cosine", "centred"}
    assert len(found.to_csv().splitlines()) == 6
    low, high = found.interval("norm")
    assert (low <= found.mean("norm")).all()
    assert (found.mean("norm") <= high).all()
    assert 0 < found.unigram <= 1


def test_trace_page():
    class Words:
        def decode(self, ids):
            return "<b>" if ids[0] == 5 else f" w{ids[0]}"

    ids = torch.tensor([4, 5, 6, 7])
    model = tiny("llama", width=64)
    found = trace(model, ids, Words())
    assert len(found.decoded) == 5
    assert found.matches[0][:3] == ("in", "in", "in")
    page = found.to_html("A <title>")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "A &lt;title&gt;" in page
    assert page.count("<tr>") == 6
    assert "http" not in page
    with pytest.raises(DataError, match="two tokens"):
        trace(model, ids[:1], Words())
    with pytest.raises(DataError, match="type list"):
        trace(model, [4, 5], Words())
    with pytest.raises(DataError, match=r"torch\.float32"):
        trace(model, ids.float(), Words())
    with pytest.raises(DataError, match=r"from 4 to 907; the model has 0\.\.96"):
        trace(model, ids + 900 * (ids == 7), Words())
