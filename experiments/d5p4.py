"""Selectors on random pools: log-determinant, gap to the best set known, validity, CPU seconds; and what a forward costs.

All 4^4 sets of the small pool are tried. The 8^8 sets of the large one are not: the best known set is the best end of
local searches (exchanges within a group) from many random sets and of every selector that keeps the partition.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tables import result, table
from torch import Tensor

from thrifty.llm import d5p4

Method = Callable[[Tensor, Tensor, Tensor, int, int], tuple[int, ...]]
DPPY = "k-DPP, DPPy"
FREE = ("k-DPP, own", DPPY)  # draw without the partition


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


METHODS: dict[str, Method] = {
    "independent": lambda q, c, kernel, k, seed: d5p4.independent(len(q), k, seeded(seed)).indices,
    "greedy beam": lambda q, c, kernel, k, seed: d5p4.greedy_beam(q, k).indices,
    "diverse beam, alpha 1": lambda q, c, kernel, k, seed: d5p4.diverse_beam(q, c, k, 1.0).indices,
    "greedy MAP, one start": lambda q, c, kernel, k, seed: d5p4.greedy_map(kernel, k, starts="one").indices,
    "greedy MAP": lambda q, c, kernel, k, seed: d5p4.greedy_map(kernel, k).indices,
    "greedy MAP, polished": lambda q, c, kernel, k, seed: d5p4.greedy_map(kernel, k, polish=True).indices,
    "k-DPP, own": lambda q, c, kernel, k, seed: d5p4.k_dpp(kernel, k, seeded(seed)).indices,
}


def dppy_method() -> Method | None:
    """Return DPPy's exact k-DPP, eigendecomposition included as in ours, or None where it is not installed."""
    try:
        from dppy.finite_dpps import FiniteDPP
    except ImportError:
        return None

    def choose(q: Tensor, c: Tensor, kernel: Tensor, k: int, seed: int) -> tuple[int, ...]:
        found = FiniteDPP("likelihood", L=kernel.numpy()).sample_exact_k_dpp(k, random_state=np.random.RandomState(seed))
        return tuple(sorted(int(i) for i in found))

    return choose


def pool(spec: dict[str, Any], kind: str, k: int, w: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return qualities (n,) and cosines (n, n) of a random pool."""
    generator = seeded(spec["seed"] + seed)
    x = torch.randn(k * w, spec["width"], generator=generator, dtype=torch.float64)
    if kind == "children":
        x = torch.randn(k, spec["width"], generator=generator, dtype=torch.float64).repeat_interleave(w, 0) + spec["spread"] * x
    raw = torch.randn(k * w, generator=generator, dtype=torch.float64)
    return d5p4.normalised(raw), d5p4.gram(x)


def values(kernel: Tensor, sets: Tensor) -> Tensor:
    """Return the log-determinant of sets (..., k)."""
    sign, value = torch.linalg.slogdet(kernel[sets[..., :, None], sets[..., None, :]])
    return torch.where(sign > 0, value, -torch.inf)


def local_search(kernel: Tensor, k: int, w: int, restarts: int, seed: int) -> float:
    """Return the best value after the best exchanges within a group, from random sets, until none helps anywhere."""
    base = torch.arange(k) * w
    sets = base + torch.randint(w, (restarts, k), generator=seeded(seed))
    best = values(kernel, sets)
    while True:
        tried = sets[:, None, None, :].expand(-1, k, w, -1).clone()
        for group in range(k):
            tried[:, group, :, group] = base[group] + torch.arange(w)
        found, at = values(kernel, tried).flatten(1).max(1)
        better = found > best + 1e-12
        if not bool(better.any()):
            return float(best.max())
        moved = tried.flatten(1, 2)[torch.arange(restarts), at]
        sets = torch.where(better[:, None], moved, sets)
        best = torch.where(better, found, best)


def one_shape(spec: dict[str, Any], methods: dict[str, Method], k: int, w: int) -> list[dict[str, Any]]:
    """Return a row for every pool, kernel and method."""
    rows = []
    for kind, (form, beta) in itertools.product(spec["pools"], spec["kernels"]):
        seen: dict[str, dict[str, list[float]]] = {m: {"value": [], "gap": [], "seconds": [], "valid": []} for m in methods}
        failed = dict.fromkeys(methods, 0)
        kept = draws = 0  # of DPPy's sets, how many have one of each group
        for trial in range(spec["trials"]):
            q, cosines = pool(spec, kind, k, w, trial)
            kernel = d5p4.kernel(q, cosines, form, beta)
            found = {}
            for name, method in methods.items():
                start = time.process_time()
                try:
                    chosen = method(q, cosines, kernel, k, trial)
                except Exception:  # DPPy raises several kinds on kernels that it cannot sample; counted
                    failed[name] += 1
                    continue
                seen[name]["seconds"].append(time.process_time() - start)
                found[name] = (d5p4.log_det(kernel, chosen), len({i // w for i in chosen}) == k)
            if DPPY in methods and k * w == 64:
                for again in range(spec["draws"]):
                    chosen = methods[DPPY](q, cosines, kernel, k, 1000 * (again + 1) + trial)
                    kept, draws = kept + (len({i // w for i in chosen}) == k), draws + 1
            if w**k <= 4096:
                best = d5p4.exhaustive(kernel, k).value
            else:
                best = max(
                    local_search(kernel, k, w, spec["restarts"], trial),
                    *(v for name, (v, _) in found.items() if name not in FREE),
                )
            for name, (value, valid) in found.items():
                seen[name]["value"].append(value)
                seen[name]["gap"].append(best - value)
                seen[name]["valid"].append(float(valid))
        for name, numbers in seen.items():
            row: dict[str, Any] = {"pool": kind, "k": k, "w": w, "form": form, "beta": beta, "method": name}
            row |= {"failed": failed[name], "best": "all sets" if w**k <= 4096 else "restarts"}
            if numbers["value"]:
                row |= {m: statistics.fmean(numbers[m]) for m in ("value", "gap", "valid")}
                row |= {"largest_gap": max(numbers["gap"]), "seconds": statistics.median(numbers["seconds"])}
            if name == DPPY and draws:
                row |= {"kept": kept, "draws": draws}
            rows.append(row)
    return rows


def forward(spec: dict[str, Any]) -> dict[str, float]:
    """Return CPU seconds of one state of 1 x length tokens, and of what selection needs besides the choice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(49152, (1, spec["length"]), generator=seeded(0))
    with torch.inference_mode():
        log_p = torch.log_softmax(model(ids, use_cache=False).logits, -1)
        hidden = torch.randn(64, spec["length"], 576, generator=seeded(1))
        return {
            "parameters": float(sum(p.numel() for p in model.parameters())),
            "forward": least(lambda: model(ids, use_cache=False)),
            "quality": least(lambda: d5p4.quality(log_p)),
            "gram": least(lambda: d5p4.gram(hidden)),
        }


def least(call: Callable[[], Any], times: int = 5) -> float:
    """Return the least CPU seconds of some calls."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Measure all selectors and one forward pass."""
    methods = dict(METHODS)
    if (theirs := dppy_method()) is not None:
        methods[DPPY] = theirs
    q, cosines = pool(spec, "random", 8, 8, 0)
    for method in methods.values():  # the first call loads libraries
        method(q, cosines, d5p4.kernel(q, cosines), 8, 0)
    rows = [row for k, w in spec["shapes"] for row in one_shape(spec, methods, k, w)]
    return {"rows": rows, "network": forward(spec)}


def selector_table() -> str:
    """Return value, gap and time by method, kernels and pools together (value of one kernel apart)."""
    found = result("d5p4_selector")
    parts = []
    for k, w in found["spec"]["shapes"]:
        chosen = [r for r in found["rows"] if (r["k"], r["w"]) == (k, w)]
        settings = list(dict.fromkeys((r["pool"], r["form"], r["beta"]) for r in chosen))
        lines = []
        for method in dict.fromkeys(r["method"] for r in chosen):
            own = {(r["pool"], r["form"], r["beta"]): r for r in chosen if r["method"] == method}
            cells = [gap(own[s], method in FREE) for s in settings]
            done = [r for r in own.values() if "seconds" in r]
            seconds = statistics.median(r["seconds"] for r in done) if done else float("nan")
            valid = statistics.fmean(r["valid"] for r in done) if done else float("nan")
            lines.append([method, *cells, f"{100 * valid:.0f} %", f"{1000 * seconds:.2f}"])
        signs = {"additive": "+", "multiplicative": "×"}
        header = [f"{k} groups of {w}", *(f"{p}, {signs[f]} β = {b:g}" for p, f, b in settings), "one per group", "CPU ms"]
        against = "best of all sets" if chosen[0]["best"] == "all sets" else "best set known"
        parts.append(f"Mean value; in brackets the mean gap to the {against}.\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def gap(row: dict[str, Any], free: bool) -> str:
    if "value" not in row:
        return f"failed {row['failed']}"
    failed = f", failed {row['failed']}" if row["failed"] else ""
    shown = "" if free else f" ({max(row['gap'], 0.0):.3f})"
    return f"{row['value']:.2f}{shown}{failed}"


def cost_table() -> str:
    """Return the time of a choice among 64 beside DPPy and one forward pass."""
    found = result("d5p4_selector")
    large = [r for r in found["rows"] if r["k"] * r["w"] == 64 and "seconds" in r]
    network = found["network"]

    def of(method: str) -> float:
        times = [r["seconds"] for r in large if r["method"] == method]
        return statistics.median(times) if times else float("nan")

    theirs = [r for r in large if "draws" in r]
    share = sum(r["kept"] for r in theirs) / max(1, sum(r["draws"] for r in theirs)) or float("nan")
    lines = []
    for method in ("greedy MAP, one start", "greedy MAP", "greedy MAP, polished", "diverse beam, alpha 1", "k-DPP, own"):
        seconds = of(method)
        own = [f"{1000 * seconds:.2f}", f"{of(DPPY) / seconds:.1f}", f"{of(DPPY) / share / seconds:.0f}", f"{100 * seconds / network['forward']:.2f} %"]
        lines.append([method, *own, f"{100 * seconds / network['forward'] / 64:.3f} %"])
    size = f"{network['parameters'] / 1e6:.0f} M"
    length = found["spec"]["length"]
    note = (
        f"\n\nDPPy draws sets without the partition; {100 * share:.1f} % of {sum(r['draws'] for r in theirs)} had one of each "
        f"group, which the third column divides by (not run as a loop). Forward pass: a random Llama of SmolLM2-135M's shape ({size} parameters), 1 × {length} tokens, float32, one "
        f"core: {1000 * network['forward']:.0f} ms of CPU. A step takes 64 of them. Besides the choice, selection needs the "
        f"quality of each state ({1000 * network['quality']:.1f} ms a state) and the Gram matrix of 64 states "
        f"({1000 * network['gram']:.0f} ms a step)."
    )
    header = ["choice of 8 among 64", "CPU ms", "DPPy's time / its", "DPPy until one per group / its", "of one forward", "of the 64 forwards of a step"]
    return table(header, lines) + note


TABLES: dict[str, Callable[[], str]] = {"d5p4_selector": selector_table, "d5p4_cost": cost_table}
