"""Fine-tuning SmolLM2-135M on one task: what is learned there, what is lost elsewhere. GaLLoP beside its rivals.

A cell is (method, seed); each is stored in results/partial/NAME/ as soon as it is done, and an interrupted run goes on
from there. The learning rate of each method is chosen on the validation split of the task that is trained (one seed that
no cell uses); test splits are the same for all cells.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gallop_tasks
import torch
from gallop_cost import measured, smollm2
from gallop_tasks import Item
from run import write_json
from tables import result, table

from thrifty.llm.families import parts_of
from thrifty.llm.gallop import Select, SparseAdamW, select
from thrifty.llm.loading import (
    Encoded,
    Example,
    batches,
    collate,
    completion_logits,
    completion_losses,
    encode,
    load_model,
)

PARTIAL = Path(__file__).resolve().parent / "results" / "partial"
SPARSE = {"GaLLoP": "gallop", "SAFT": "saft", "random mask": "random", "lowest magnitude": "lowest", "highest magnitude": "highest"}
TOKENS = 64  # no example is longer


def encoded(items: Sequence[Item], tokenizer: Any) -> list[Encoded]:
    """Return prompts with the right answers and the end of the text."""
    return encode([Example(i.answer, i.prompt) for i in items], tokenizer, TOKENS)


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, items: Sequence[Item]) -> dict[str, Any]:
    """Return 0/1 an item: `chosen`, the right one of four completions is the likeliest; `exact`, greedy decoding gives it.

    Greedy decoding gives the answer exactly when, at each of its tokens, the likeliest one is the answer's (the end of
    the text aside, as a model that was not trained on this format goes on): no decoding is needed.
    """
    model.eval()
    rows = [Example(choice, i.prompt) for i in items for choice in i.choices]
    scores, greedy = [], []
    for batch in batches(encode(rows, tokenizer, TOKENS, end=False), 48, tokenizer.pad_token_id):
        logits, goal, learned = completion_logits(model, batch.to(model.device))
        logits = logits.float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view_as(goal)
        scores += (losses * learned).sum(1).tolist()
        greedy += ((logits.argmax(-1) == goal) | ~learned).all(1).tolist()
    chosen, exact, at = [], [], 0
    for item in items:
        n = len(item.choices)
        here = scores[at : at + n]
        chosen.append(int(item.choices[here.index(min(here))] == item.answer))
        exact.append(int(greedy[at + item.choices.index(item.answer)]))
        at += n
    return {"chosen": chosen, "exact": exact}


@torch.no_grad()
def validation_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Return the mean loss of the answers."""
    model.eval()
    return float(torch.cat([completion_losses(model, b.to(model.device)) for b in batches(rows, 48)]).mean())


def orders(n: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Return the examples of each update, the same for all methods."""
    generator, found = torch.Generator().manual_seed(seed), []
    while len(found) < steps:
        order = torch.randperm(n, generator=generator).tolist()
        found += [order[i : i + batch] for i in range(0, n - batch + 1, batch)]
    return found[:steps]


def trainer(model: Any, method: str, rows: Sequence[Encoded], spec: dict[str, Any], seed: int, lr: float) -> tuple[Any, Any, int]:
    """Return (the model to call, an optimiser with step(rate), how many scalars are trained)."""
    if method in ("LoRA", "DoRA"):
        import peft

        names = sorted({path.rsplit(".", 1)[-1] for path in parts_of(model).family.weights})
        config = peft.LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules=names, use_dora=method == "DoRA")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = peft.get_peft_model(model, config)  # adapters in float32
        chosen = [p for p in model.parameters() if p.requires_grad]
        return model, Dense(chosen, lr), sum(p.numel() for p in chosen)
    if method == "full":  # AdamW of all weights, with float32 masters
        everything = select(model, (), Select(density=1.0, score="highest", patterns=("*",)))
        return model, Sparse(SparseAdamW(model, everything, lr, clip=1.0, gradient="dense")), everything.count
    settings = Select(density=spec["density"], score=SPARSE[method], seed=seed, batch=16)
    chosen = select(model, rows, settings)
    return model, Sparse(SparseAdamW(model, chosen, lr, clip=1.0)), chosen.count


class Dense:
    """torch's AdamW, clipped."""

    def __init__(self, chosen: list[Any], lr: float) -> None:
        self.chosen, self.adamw = chosen, torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)

    def step(self, rate: float) -> None:
        self.adamw.param_groups[0]["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.chosen, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()


class Sparse:
    """SparseAdamW."""

    def __init__(self, adamw: SparseAdamW) -> None:
        self.adamw = adamw

    def step(self, rate: float) -> None:
        self.adamw.lr = rate
        self.adamw.step()


def train(base: Any, tokenizer: Any, method: str, seed: int, lr: float, steps: int, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a tuned copy and what it took."""
    split = gallop_tasks.splits(spec["task"], spec["sizes"], seed)
    rows = encoded(split["train"], tokenizer)
    start = time.process_time()
    model, optimizer, count = trainer(copy.deepcopy(base), method, rows, spec, seed, lr)
    chosen = time.process_time()
    model.train()
    losses = []
    for number, order in enumerate(orders(len(rows), spec["batch"], steps, seed)):
        batch = collate([rows[i] for i in order], tokenizer.pad_token_id)
        loss = completion_losses(model, batch.to(model.device)).mean()
        loss.backward()
        rise, left = (number + 1) / max(1, steps // 10), (steps - number) / steps
        optimizer.step(lr * min(1.0, rise, left / 0.9))
        losses.append(float(loss.detach()))
    return model, {
        "lr": lr, "scalars": count, "select_seconds": chosen - start, "train_seconds": time.process_time() - chosen,
        "losses": [round(x, 4) for x in losses],
    }  # fmt: skip


def rate_loss(base: Any, tokenizer: Any, method: str, spec: dict[str, Any], lr: float) -> float:
    """Return the validation loss of a learning rate, after a shorter training with a seed of its own."""
    split = gallop_tasks.splits(spec["task"], spec["sizes"], spec["rate_seed"])
    model, _ = train(base, tokenizer, method, spec["rate_seed"], lr, spec["rate_steps"], spec)
    return validation_loss(model, encoded(split["validation"], tokenizer))


def group_of(method: str) -> str:
    """Return whose list of learning rates a method has."""
    return "full" if method == "full" else "PEFT" if method in ("LoRA", "DoRA") else "sparse"


def cell(path: Path, make: Any) -> Any:
    """Return a stored cell, or make and store it."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    made = make()
    write_json(path, made)
    gc.collect()
    return made


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Run all cells that are not stored yet."""
    base, tokenizer = load_model(smollm2(), dtype=spec["dtype"], device=spec.get("device", "cpu"))
    tests = {task: gallop_tasks.splits(task, {"test": spec["sizes"]["test"]}, 0)["test"] for task in gallop_tasks.TASKS}
    folder = PARTIAL / name

    vanilla = cell(folder / "vanilla.json", lambda: {"tests": scores(base, tokenizer, tests)})
    tried, cells = {}, []
    for method in spec["methods"]:
        short = method.replace(" ", "_")
        tried[method] = {
            f"{lr:g}": cell(folder / f"{short}_rate_{lr:g}.json", partial(rate_loss, base, tokenizer, method, spec, lr))
            for lr in spec["rates"][group_of(method)]
        }
        lr = float(min(tried[method], key=tried[method].__getitem__))
        for seed in spec["seeds"]:
            make = partial(one, base, tokenizer, method, seed, lr, spec, tests)
            cells.append(cell(folder / f"{short}_{seed}_{lr:g}.json", make))
    return {"vanilla": vanilla, "rates": tried, "cells": cells}


def one(base: Any, tokenizer: Any, method: str, seed: int, lr: float, spec: dict[str, Any], tests: dict[str, Any]) -> dict[str, Any]:
    """Train and test one cell."""
    model, took = train(base, tokenizer, method, seed, lr, spec["steps"], spec)
    return {"method": method, "seed": seed, **took, "tests": scores(model, tokenizer, tests)}


def scores(model: Any, tokenizer: Any, tests: dict[str, list[Item]]) -> dict[str, Any]:
    """Return what a model does on all test splits."""
    return {task: evaluate(model, tokenizer, items) for task, items in tests.items()}


# tables


def accuracy(of: dict[str, Any], kind: str) -> float:
    return 100 * statistics.mean(of[kind])


def forgotten(cell: dict[str, Any], vanilla: dict[str, Any], own: str, kind: str = "chosen") -> float:
    """Return the forget ratio: the share of the vanilla accuracy over the other tasks that is gone, at least 0."""
    others = [t for t in cell["tests"] if t != own]
    before, after = (statistics.mean(accuracy(c["tests"][t], kind) for t in others) for c in (vanilla, cell))
    return max(0.0, (before - after) / before)


def collapsed(cell: dict[str, Any], own: str) -> int:
    """Return how many of the other tasks are answered exactly in less than 1 % of the cases."""
    return sum(accuracy(of, "exact") < 1 for task, of in cell["tests"].items() if task != own)


def real_table(name: str = "gallop_numbers") -> str:
    """Return the comparison: mean over seeds, single seeds in brackets where there are few."""
    r = result(name)
    spec, vanilla = r["spec"], r["vanilla"]
    own, others = spec["task"], [t for t in gallop_tasks.TASKS if t != spec["task"]]
    rows = [[
        "vanilla", "", f"{accuracy(vanilla['tests'][own], 'chosen'):.1f}", f"{accuracy(vanilla['tests'][own], 'exact'):.1f}",
        *(f"{accuracy(vanilla['tests'][t], 'chosen'):.1f}" for t in others), "", "", str(collapsed(vanilla, own)),
    ]]  # fmt: skip
    for method in spec["methods"]:
        mine = [c for c in r["cells"] if c["method"] == method]
        rows.append([
            method, f"{mine[0]['lr']:g}", spread([accuracy(c["tests"][own], "chosen") for c in mine]), spread([accuracy(c["tests"][own], "exact") for c in mine]),
            *(spread([accuracy(c["tests"][t], "chosen") for c in mine]) for t in others),
            spread([100 * forgotten(c, vanilla, own) for c in mine]), f"{mine[0]['scalars'] / 1e6:.2f} M",
            " / ".join(str(collapsed(c, own)) for c in mine),
        ])  # fmt: skip
    head = ("method", "rate", f"{own} (trained), %", f"{own}, exact %", *(f"{t} (not trained), %" for t in others), "forget ratio, %", "scalars", "collapsed tasks, by seed")
    return table(head, rows)


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the single values in brackets."""
    each = " / ".join(f"{v:.1f}" for v in values)
    return f"{statistics.mean(values):.1f} ({each})" if len(values) > 1 else f"{values[0]:.1f}"


def paired_table(name: str = "gallop_numbers") -> str:
    """Return the difference to GaLLoP, item by item, with a 95 % bootstrap interval over items and seeds."""
    r = result(name)
    own = r["spec"]["task"]
    rows = []
    for method in r["spec"]["methods"]:
        if method != "GaLLoP":
            rows.append([method, *(difference(r, method, tasks) for tasks in ([own], [t for t in gallop_tasks.TASKS if t != own]))])
    return table(("GaLLoP minus", "trained task, points", "other tasks, points"), rows)


def difference(r: dict[str, Any], method: str, tasks: list[str], draws: int = 2000) -> str:
    by = {m: {c["seed"]: c for c in r["cells"] if c["method"] == m} for m in ("GaLLoP", method)}
    gaps = [
        a - b
        for seed in by[method]
        for t in tasks
        for a, b in zip(by["GaLLoP"][seed]["tests"][t]["chosen"], by[method][seed]["tests"][t]["chosen"])
    ]
    values = 100 * torch.tensor(gaps, dtype=torch.float64)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(values[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{float(values.mean()):+.1f} ({low:+.1f} to {high:+.1f})"


def rates_table(name: str = "gallop_numbers") -> str:
    """Return the validation losses from which the learning rates were chosen."""
    r = result(name)
    rows = [[m, ", ".join(f"{lr}: {loss:.3f}" for lr, loss in found.items())] for m, found in r["rates"].items()]
    return table(("method", "learning rate: validation loss"), rows)


def seconds_table(name: str = "gallop_numbers") -> str:
    """Return what the cells cost."""
    r = result(name)
    rows = []
    for method in r["spec"]["methods"]:
        mine = [c for c in r["cells"] if c["method"] == method]
        pick, fit = (statistics.mean(c[k] for c in mine) for k in ("select_seconds", "train_seconds"))
        rows.append([method, f"{pick:.1f}", f"{fit:.1f}"])
    return table(("method", "CPU s before training (selection)", "CPU s of training"), rows)


NUMBERS = "gallop/gallop_numbers.toml"
TABLES = {
    "gallop_real": measured(real_table, NUMBERS),
    "gallop_paired": measured(paired_table, NUMBERS),
    "gallop_rates": measured(rates_table, NUMBERS),
    "gallop_seconds": measured(seconds_table, NUMBERS),
}
