"""Which block ranges of SmolLM2 to run again, and whether it helps: tuned on one split, judged on another.

Stage 1 scans ranges at every start on the tuning split (questions with four choices, and text). Stage 2 takes the best ranges
of stage 1, and one that was fixed before, to a test split that stage 1 has not seen: all modes, two to four passes, paired with
the model itself and with the noise control. Both stages go on from results/partial/NAME/ when they were interrupted.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import smollm_choices as choices
import torch
from gallop_tasks import TASKS
from run import write_json

from thrifty.llm.inner_loop import Plan, Scan, bootstrap, loop, ranges, scan

PARTIAL = Path(__file__).resolve().parent / "results" / "partial"
MEASURES = ("right", "chosen", "text")


class Split:
    """The examples of one split, and the measures of a row of scores."""

    def __init__(self, tokenizer: Any, spec: dict[str, Any], name: str) -> None:
        settings = spec[name]
        per_task = {part: spec[part]["questions"] for part in ("test", "tune")}
        self.items, packed = choices.packed(choices.questions(per_task, name), tokenizer, settings["batch"])
        rows = choices.text_rows(tokenizer, (settings["text"],), settings["sequences"], settings["tokens"])
        self.batches = [*packed, *choices.text_batches(rows, 8)]
        self.tokens = int(sum(b.learned.sum() for b in self.batches))

    def measured(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """Return per question 0/1 `chosen` and the log-probability of the `right` choice; per sequence the mean log p of `text`."""
        found = choices.measures(self.items, torch.as_tensor(scores))
        text = scores[choices.WAYS * len(self.items) :]
        return {**{k: v.numpy() for k, v in found.items()}, "text": text}

    def summary(self, base: np.ndarray) -> dict[str, Any]:
        """Return what the model itself does."""
        found = self.measured(base)
        tasks = np.array([choices.task_of(i) for i in self.items])
        return {
            "questions": len(self.items), "sequences": len(found["text"]), "tokens scored": self.tokens,
            **{k: float(v.mean()) for k, v in found.items()},
            "by task": {t: {k: float(found[k][tasks == t].mean()) for k in ("chosen", "right")} for t in TASKS},
        }  # fmt: skip


def run(model: Any, tokenizer: Any, spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Run both stages."""
    folder = PARTIAL / name
    folder.mkdir(parents=True, exist_ok=True)
    tune, test = (Split(tokenizer, spec, part) for part in ("tune", "test"))
    with torch.inference_mode():
        exact = copy.deepcopy(model).float()
        packing = {d: choices.packing_error(m, tokenizer, tune.items[::12]) for d, m in (("float32", exact), (spec["dtype"], model))}
        del exact
    begun = time.process_time()
    plans = [p for length in spec["lengths"] for mode in spec["scan_modes"] for p in ranges(30, length, mode=mode) if p.end - p.start == length]
    first = scanned(model, tune, plans, folder / "tune.json")
    spent(folder, "scan_seconds", begun)
    begun = time.process_time()
    cells = [tuning_cell(tune, first, i) for i in range(len(plans))]
    chosen = choose(cells, spec["fixed_range"])
    tried = [Plan(*span, r, m) for span in dict.fromkeys(tuple(c["range"]) for c in chosen) for r in spec["passes"] for m in spec["modes"]]
    second = scanned(model, test, tried, folder / "test.json")
    seconds = spent(folder, "test_seconds", begun)
    judgement = judged(test, second)
    best = max(judgement, key=lambda row: row["to base"]["text"][0])
    control = temperature(model, tune, test, Plan(*best["range"], best["passes"], best["mode"]), spec["temperatures"])
    return {
        "packing_error": packing, "tune": tune.summary(first.base), "cells": cells, "ranges": chosen,
        "test": test.summary(second.base), "judged": judgement, "temperature": control,
        **seconds,
    }  # fmt: skip


def spent(folder: Path, name: str, begun: float) -> dict[str, float]:
    """Return the CPU seconds of each stage over all runs that went on from one another."""
    path = folder / "seconds.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found[name] = found.get(name, 0.0) + time.process_time() - begun
    write_json(path, found)
    return found


def scanned(model: Any, split: Split, plans: list[Plan], state: Path) -> Scan:
    """Return the library's scan of all plans over a split, complete, going on from its state."""
    say = lambda done, of, words: print(f"{state.stem} {done}/{of} {words}", flush=True)  # noqa: E731
    return scan(model, split.batches, plans, score=choices.score, stop=None, reuse=True, state=state, progress=say)


def tuning_cell(split: Split, found: Scan, index: int) -> dict[str, Any]:
    """Return the mean difference to the model itself in every measure, with the 95 % interval."""
    cell = found.cells[index]
    base, looped = split.measured(found.base), split.measured(found.base + cell.differences)
    return {"range": [cell.plan.start, cell.plan.end], "mode": cell.plan.mode, **{k: with_interval(looped[k] - base[k]) for k in MEASURES}}


def with_interval(values: np.ndarray) -> list[float]:
    """Return mean, low and high."""
    return [round(float(x), 6) for x in (values.mean(), *bootstrap(values))]


def choose(cells: list[dict[str, Any]], fixed: list[int]) -> list[dict[str, Any]]:
    """Return the ranges for stage 2, and why: the best of the scan by three rules, and the one fixed before."""
    found = [{"range": fixed, "why": "fixed before: 40-60 % of the depth"}]
    for mode, measure in (("uniform", "right"), ("uniform", "text"), ("naive", "right")):
        best = max((c for c in cells if c["mode"] == mode), key=lambda c: c[measure][0])
        found.append({"range": best["range"], "why": f"best of the scan: {mode}, {measure}"})
    return found


def judged(split: Split, found: Scan) -> list[dict[str, Any]]:
    """Return every plan against the model itself, and against the noise control of the same range and passes."""
    base = split.measured(found.base)
    scored = {key(c.plan): split.measured(found.base + c.differences) for c in found.cells}
    rows = []
    for cell in found.cells:
        plan, mine = cell.plan, scored[key(cell.plan)]
        noise = scored[(plan.start, plan.end, plan.passes, "noise")]
        row = {"range": [plan.start, plan.end], "passes": plan.passes, "mode": plan.mode}
        row["to base"] = {k: with_interval(mine[k] - base[k]) for k in MEASURES}
        row["to noise"] = {k: with_interval(mine[k] - noise[k]) for k in MEASURES}
        rows.append(row)
    return rows


def temperature(model: Any, tune: Split, test: Split, plan: Plan, tried: list[float]) -> dict[str, Any]:
    """Return what a temperature, chosen on the tuning split, does to text: to the model itself and to its best loop.

    A gain in log p may be one of calibration alone, which dividing the logits by one number would also give.
    """
    def scores(split: Split, at: float) -> np.ndarray:
        texts = [b for b in split.batches if not isinstance(b, choices.Choices)]
        with torch.inference_mode():
            return torch.cat([choices.score(model, b, at) for b in texts]).double().numpy()

    def chosen() -> tuple[float, np.ndarray, np.ndarray]:
        at = max(tried, key=lambda t: scores(tune, t).mean())
        return at, scores(test, 1.0), scores(test, at)

    base = chosen()
    with loop(model, plan):
        looped = chosen()
    return {
        "plan": {"range": [plan.start, plan.end], "passes": plan.passes, "mode": plan.mode},
        "base at": base[0], "loop at": looped[0],
        "base": with_interval(base[2] - base[1]), "loop": with_interval(looped[1] - base[1]),
        "both": with_interval(looped[2] - base[1]), "loop beyond temperature": with_interval(looped[2] - base[2]),
    }  # fmt: skip


def key(plan: Plan) -> tuple[int, int, int, str]:
    return plan.start, plan.end, plan.passes, plan.mode
