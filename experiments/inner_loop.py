"""Inner loop on the small causal language model: ranges by modes by passes, held-out cross-entropy and next-token accuracy.

The heat map is of validation text; the best plan on it is judged, with all others of the table, on test text, paired with the
model itself and with the noise control over sequences. What is done is kept in runs/inner_loop/NAME.json.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import small_lm
import torch
from run import write_json
from tables import ROOT, result, table
from torch import Tensor, nn

from thrifty.llm.inner_loop import Plan, bootstrap, loop, ranges, scan
from thrifty.llm.loading import Batch, load_model

NAME = "inner_loop_small_lm"
MODES = ("naive", "uniform", "reference", "alignment", "damped", "noise")
APART = ("uniform", "alignment", "noise")  # modes also mixed at the boundary


def rows_of(tok: Any, part: str, context: int, count: int) -> Tensor:
    """Return `count` windows (count, context) spread over a split."""
    found = small_lm.windows(small_lm.stream(part, small_lm.SPECIAL[small_lm.END], tok), context)
    return found[torch.linspace(0, len(found) - 1, count).long()]


def batches_of(rows: Tensor, size: int = 32) -> list[Batch]:
    """Return windows as batches of thrifty.llm.loading, every token but the first predicted."""
    learned = torch.ones_like(rows, dtype=torch.bool)
    learned[:, 0] = False
    return [Batch(i, torch.ones_like(i), m) for i, m in zip(rows.split(size), learned.split(size), strict=True)]


def measured(model: nn.Module, batches: list[Batch]) -> np.ndarray:
    """Return (2, n): mean cross-entropy and accuracy of the next token, of each sequence."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            logits, goal = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float(), batch.ids[:, 1:]
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view_as(goal)
            found.append(torch.stack([losses.mean(1), (logits.argmax(-1) == goal).float().mean(1)]))
    return torch.cat(found, 1).double().numpy()


def plans_of(spec: dict[str, Any], best: list[Plan]) -> list[Plan]:
    """Return the plans of the table, then the same ranges mixed at their boundary, then those chosen on validation."""
    found = [
        Plan(s, e, r, mode) for s, e in spec["ranges"] for r in spec["passes"] for mode in spec["modes"]
        if (r, mode) != (2, "reference")  # uniform, for two passes
    ]  # fmt: skip
    found += [Plan(s, e, r, m, "boundary") for s, e in spec["granularity"] for r in spec["passes"] for m in APART]
    beside = [Plan(p.start, p.end, p.passes, "noise") for p in best]
    return list(dict.fromkeys([*found, *best, *beside]))


def interval(values: np.ndarray, seed: int) -> list[float]:
    """Return the mean of paired differences and the ends of its 95 % bootstrap interval."""
    return [float(values.mean()), *bootstrap(values, seed)]


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Scan validation text, then judge the plans of the table and the chosen ones on test text."""
    model, tok = load_model(ROOT / spec["model"])
    blocks, seed = model.config.num_hidden_layers, spec["seed"]
    folder = ROOT / "runs" / "inner_loop"
    folder.mkdir(parents=True, exist_ok=True)
    choose = batches_of(rows_of(tok, "validation", spec["context"], spec["choose"]))
    every = {mode: ranges(blocks, passes=2, mode=mode) for mode in ("naive", "uniform")}
    scans = {mode: scan(model, choose, plans, stop=None, state=folder / f"{name}_{mode}.json") for mode, plans in every.items()}
    best = [found.best().plan for found in scans.values()]
    judge = batches_of(rows_of(tok, "test", spec["context"], spec["judge"]))
    state = folder / f"{name}.json"
    kept: dict[str, Any] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    base = measured(model, judge)
    plans = plans_of(spec, best)
    for done, plan in enumerate(plans):
        if plan.to_json() not in kept:
            with loop(model, plan):
                kept[plan.to_json()] = measured(model, judge).tolist()
            if done % 10 == 0 or plan is plans[-1]:
                write_json(state, kept)
                print(f"{name}: {done + 1} of {len(plans)}", flush=True)
    away = {plan: np.asarray(kept[plan.to_json()]) - base for plan in plans}
    cells = []
    for plan, difference in away.items():
        control = away.get(Plan(plan.start, plan.end, plan.passes, "noise", plan.granularity))
        cells.append({
            "start": plan.start, "end": plan.end, "passes": plan.passes, "mode": plan.mode, "granularity": plan.granularity,
            "loss": interval(difference[0], seed), "accuracy": interval(difference[1], seed),
            "over_noise": None if control is None else interval(difference[0] - control[0], seed),
        })  # fmt: skip
    return {
        "blocks": blocks, "sequences": base.shape[1], "tokens": base.shape[1] * (spec["context"] - 1),
        "base": {"loss": float(base[0].mean()), "accuracy": float(base[1].mean())},
        "heat": {mode: [[None if np.isnan(v) else -v for v in row] for row in f.matrix().tolist()] for mode, f in scans.items()},
        "chosen": {mode: [f.best().plan.start, f.best().plan.end, -f.best().mean] for mode, f in scans.items()},
        "cells": cells,
    }  # fmt: skip


def same_as(mode: str, passes: int) -> str:
    """Return the mode whose cell holds the numbers: with two passes the reference is uniform."""
    return "uniform" if (mode, passes) == ("reference", 2) else mode


def found_cell(start: int, end: int, passes: int, mode: str, granularity: str = "block") -> dict[str, Any]:
    """Return one cell of the result."""
    wanted = {"start": start, "end": end, "passes": passes, "mode": same_as(mode, passes), "granularity": granularity}
    return next(c for c in result(NAME)["cells"] if all(c[k] == v for k, v in wanted.items()))


def shown(values: list[float], scale: float = 1.0, places: int = 4) -> str:
    """Return a difference with its interval."""
    mean, low, high = (scale * v for v in values)
    return f"{mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"


def span(start: int, end: int) -> str:
    return f"{start}–{end - 1}" if end - start > 1 else f"{start}"


def loop_table() -> str:
    """Return the change of the loss by range, passes and mode, and the accuracy of uniform."""
    found = result(NAME)
    rows = [
        [span(s, e), r, *(f"{found_cell(s, e, r, m)['loss'][0]:+.4f}" for m in MODES)]
        for s, e in found["spec"]["ranges"] for r in found["spec"]["passes"]
    ]  # fmt: skip
    base = found["base"]
    note = (
        f"Change of the cross-entropy of the next token in nats (below zero helps); the model itself has {base['loss']:.4f}, and "
        f"{100 * base['accuracy']:.2f} % of its next tokens right. {found['sequences']} test sequences of "
        f"{found['spec']['context']} tokens, first to last block of the range, passes in all, mixed at every block.\n\n"
    )
    return note + table(("blocks", "passes", *MODES), rows)


def better(cell: dict[str, Any]) -> bool:
    return bool(cell["loss"][2] < 0)


def judged_table() -> str:
    """Return the plans chosen on validation with their intervals, the best of the table, and how many help."""
    found = result(NAME)
    rows = []
    for mode, (start, end, validation) in found["chosen"].items():
        cell = found_cell(start, end, 2, mode)
        rows.append([f"{mode}, blocks {span(start, end)}, 2 passes: chosen on validation ({validation:+.4f} there)", *intervals(cell)])
    plain = [c for c in found["cells"] if c["mode"] != "noise"]
    cell = min(plain, key=lambda c: c["loss"][0])
    rows.append([f"{cell['mode']}, blocks {span(cell['start'], cell['end'])}, {cell['passes']} passes: best on test (tuned on it)", *intervals(cell)])
    helped = sum(map(better, plain))
    over = sum(better(c) and c["over_noise"] is not None and c["over_noise"][2] < 0 for c in plain)
    noise = [c for c in found["cells"] if c["mode"] == "noise"]
    note = (
        f"\n\n95 % bootstrap intervals over sequences, paired. Of {len(plain)} plans without noise, {helped} have an interval below "
        f"zero, and {over} of these also against the noise control of the same range; of {len(noise)} noise controls {sum(map(better, noise))}. "
        "No correction for so many comparisons."
    )
    return table(("plan", "loss", "accuracy, points", "loss against noise"), rows) + note


def intervals(cell: dict[str, Any]) -> list[str]:
    over = cell["over_noise"]
    return [shown(cell["loss"]), shown(cell["accuracy"], 100, 2), "–" if over is None else shown(over)]


def granularity_table() -> str:
    """Return mixing at every block against mixing at the boundary."""
    found = result(NAME)
    rows = []
    for start, end in found["spec"]["granularity"]:
        for mode in APART:
            for passes in found["spec"]["passes"]:
                cells = [found_cell(start, end, passes, mode, g) for g in ("block", "boundary")]
                rows.append([f"{span(start, end)}, {mode}, {passes} passes", *(shown(c["loss"]) for c in cells)])
    return table(("blocks, mode", "every block", "boundary"), rows)


def heat_picture() -> str:
    """Return the change of the validation loss of every range with two passes, naive and uniform."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    found = result(NAME)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "thrifty", "font.size": 8}):
        figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.7), constrained_layout=True)
        for axes, (mode, rows) in zip(panels, found["heat"].items(), strict=True):
            values = np.array([[np.nan if v is None else v for v in row] for row in rows])
            image = axes.imshow(values, cmap="RdBu_r", norm=SymLogNorm(0.01, vmin=-3, vmax=3))
            for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
                strong = abs(values[i, j]) > 0.5
                axes.text(j, i, f"{values[i, j]:+.2f}" if abs(values[i, j]) >= 0.01 else f"{1000 * values[i, j]:+.1f}m",
                          ha="center", va="center", fontsize=5.5, color="white" if strong else "black")  # fmt: skip
            axes.set(title=f"{mode}, 2 passes", xlabel="last block of the range", ylabel="first block")
        figure.colorbar(image, ax=panels, label="change of validation loss, nats (m: thousandths)", shrink=0.85)
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


TABLES: dict[str, Callable[[], str]] = {
    "inner_loop_small_lm": loop_table,
    "inner_loop_small_judged": judged_table,
    "inner_loop_small_granularity": granularity_table,
}
PICTURES: dict[str, Callable[[], str]] = {"inner_loop_small_lm.svg": heat_picture}
