"""Where the hidden states of SmolLM2 turn from the token that came in to the next one; what a fixed cut does to the frozen model.

Every sequence is read whole; measures are taken at every `every`-th position, as the lens costs a product with the vocabulary
at each of 31 depths. The cuts are an ablation: nothing is trained, and harm is expected.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import smollm_choices as choices
import torch
from run import write_json

from thrifty.llm.causal_shift import attenuate, curves, trace
from thrifty.llm.causal_shift.curves import Curves
from thrifty.llm.inner_loop import bootstrap
from thrifty.llm.loading import Batch

PARTIAL = Path(__file__).resolve().parent / "results" / "partial"
TRACED = "Paris is the capital of France, and Berlin is the capital of Germany."


def run(model: Any, tokenizer: Any, spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return curves, transitions and the ablation; a trace of one sentence goes to the partial results as HTML."""
    folder = PARTIAL / name
    folder.mkdir(parents=True, exist_ok=True)
    ids = torch.tensor(tokenizer(TRACED)["input_ids"])
    (folder / "trace.html").write_text(trace(model, ids, tokenizer).to_html("What SmolLM2-135M decodes to at every depth"), encoding="utf-8")
    rows = choices.text_rows(tokenizer, ("test", "train"), spec["sequences"], spec["tokens"])
    found = measured(model, [every(b, spec["every"]) for b in choices.text_batches(rows, 8)], spec, folder)
    half, flat = len(rows) // 2, np.full_like(found.values["input_match"], found.unigram)
    above_unigram = dataclasses.replace(found, values={**found.values, "input_match": flat}).transition()
    return {
        "tokens": sum(len(r.ids) for r in rows), **found.to_json(),
        "above unigram": above_unigram.__dict__,  # where output_match passes the predictor that always says the same
        "by text": {k: part(found, s).transition().__dict__ for k, s in (("Python library", slice(0, half)), ("WordNet", slice(half, None)))},
        "ablation": ablation(model, tokenizer, spec["ablation"], folder),
    }  # fmt: skip


def every(batch: Batch, step: int) -> Batch:
    """Return a batch in which only every step-th position is measured."""
    return Batch(batch.ids, batch.attention, batch.learned & (torch.arange(batch.ids.shape[1]) % step == 0))


def measured(model: Any, batches: list[Batch], spec: dict[str, Any], folder: Path) -> Curves:
    """Return the curves over all batches, each batch kept in a file as soon as it is measured."""
    pieces = []
    for number, batch in enumerate(batches):
        path = folder / f"curves_{number}.json"
        if not path.exists():
            found = curves(model, [batch], skip=spec["skip"], seed=number)
            write_json(path, {"values": {k: v.tolist() for k, v in found.values.items()}, "counts": found.counts.tolist(), "excluded": found.excluded})
        pieces.append(json.loads(path.read_text(encoding="utf-8")))
        print(f"curves {number + 1}/{len(batches)}", flush=True)
    following = torch.cat([b.ids[:, 1:][b.learned[:, 1:]] for b in batches])
    return Curves(
        values={k: np.concatenate([np.array(p["values"][k]) for p in pieces], axis=1) for k in pieces[0]["values"]},
        counts=np.concatenate([p["counts"] for p in pieces]),
        excluded={k: sum(p["excluded"][k] for p in pieces) for k in pieces[0]["excluded"]},
        unigram=float(torch.bincount(following).max()) / len(following),
        tied=True,
    )


def part(found: Curves, rows: slice) -> Curves:
    """Return the curves of some sequences."""
    return dataclasses.replace(found, values={k: v[:, rows] for k, v in found.values.items()}, counts=found.counts[rows])


def ablation(model: Any, tokenizer: Any, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the loss of the model and, for every cut, the paired difference with its interval, in nats a token."""
    rows = choices.text_rows(tokenizer, ("test",), spec["sequences"], spec["tokens"])
    batches = choices.text_batches(rows, 8)

    def losses() -> np.ndarray:
        with torch.inference_mode():
            return -torch.cat([choices.score(model, b) for b in batches]).double().numpy()

    base, cuts = losses(), []
    for layer in spec["layers"]:
        for alpha in spec["alphas"]:
            path = folder / f"cut_{layer}_{alpha}.json"
            if not path.exists():
                with attenuate(model, {layer: alpha}, placement=spec["placement"]):
                    away = losses() - base
                write_json(path, {"layer": layer, "alpha": alpha, "difference": [float(away.mean()), *bootstrap(away)]})
            cuts.append(json.loads(path.read_text(encoding="utf-8")))
    return {"loss": float(base.mean()), "sequences": len(rows), "cuts": cuts}
