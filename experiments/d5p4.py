"""Selectors on random pools: log-determinant, gap to the best set known, validity, CPU seconds; and what a whole step costs.

All 4^4 sets of the small pool are tried. The 8^8 sets of the large one are not: the best known set is the best end of
local searches (exchanges within a group) from many random sets and of every selector that keeps the partition.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tables import result, table
from torch import Tensor

from thrifty.llm import d5p4
from thrifty.llm.d5p4 import compiled

Method = Callable[[Tensor, Tensor, Tensor, int, int], tuple[int, ...]]
DPPY = "k-DPP, DPPy"
FREE = ("k-DPP, own", DPPY)  # draw without the partition
VOCABULARY, WIDTH = 49152, 576  # of SmolLM2-135M


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(kernel: Tensor, k: int) -> tuple[int, ...]:
    """Return greedy MAP's choice without numba."""
    with without_numba():
        return d5p4.greedy_map(kernel, k).indices


@contextlib.contextmanager
def without_numba() -> Iterator[None]:
    """Take the torch path within."""
    known = compiled.available
    compiled.available = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        compiled.available = known


METHODS: dict[str, Method] = {
    "independent": lambda q, c, kernel, k, seed: d5p4.independent(len(q), k, seeded(seed)).indices,
    "greedy beam": lambda q, c, kernel, k, seed: d5p4.greedy_beam(q, k).indices,
    "diverse beam, alpha 1": lambda q, c, kernel, k, seed: d5p4.diverse_beam(q, c, k, 1.0).indices,
    "greedy MAP, one start": lambda q, c, kernel, k, seed: d5p4.greedy_map(kernel, k, starts="one").indices,
    "greedy MAP": lambda q, c, kernel, k, seed: d5p4.greedy_map(kernel, k).indices,
    "greedy MAP, without numba": lambda q, c, kernel, k, seed: plain(kernel, k),
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
        rejection: dict[str, list[float]] = {"draws": [], "seconds": [], "kept": []}
        for trial in range(spec["trials"]):
            q, cosines = pool(spec, kind, k, w, trial)
            kernel = d5p4.kernel(q, cosines, form, beta)
            found = {}
            for name, method in methods.items():
                try:
                    chosen = method(q, cosines, kernel, k, trial)
                except Exception:  # DPPy raises several kinds on kernels that it cannot sample; counted
                    failed[name] += 1
                    continue
                again = lambda m=method, a=(q, cosines, kernel, k, trial): m(*a)  # noqa: E731
                seen[name]["seconds"].append(least(again))
                found[name] = (d5p4.log_det(kernel, chosen), len({i // w for i in chosen}) == k)
            if DPPY in methods and k * w == 64 and trial < spec["rejections"]:
                for key, number in until_valid(kernel, k, w, spec["most_draws"], trial).items():
                    rejection[key].append(number)
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
            if name == DPPY and rejection["draws"]:
                row["rejection"] = {key: sum(numbers) for key, numbers in rejection.items()} | {"pools": len(rejection["draws"])}
            rows.append(row)
    return rows


def until_valid(kernel: Tensor, k: int, w: int, most: int, seed: int) -> dict[str, float]:
    """Return how many draws of DPPy's k-DPP, of one object, it takes until one keeps the partition, and their CPU seconds."""
    from dppy.finite_dpps import FiniteDPP

    random, start = np.random.RandomState(seed), time.process_time()
    dpp = FiniteDPP("likelihood", L=kernel.numpy())  # decomposed once, whatever the number of draws
    for draw in range(most):
        if len({int(i) // w for i in dpp.sample_exact_k_dpp(k, random_state=random)}) == k:
            return {"draws": draw + 1, "seconds": time.process_time() - start, "kept": 1}
    return {"draws": most, "seconds": time.process_time() - start, "kept": 0}


def steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return CPU seconds of one step on a pool of 8 x 8: the denoiser and everything that selection does besides.

    A random Llama of SmolLM2-135M's shape. All positions are masked, as in the first step: the most that selection reads.
    The denoiser runs on one state, quality on 8 states; both are multiplied, as the whole pool's logits would not fit.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = []
    for dtype, length in itertools.product(("float32", "bfloat16"), spec["lengths"]):
        model.to(getattr(torch, dtype))
        denoiser = d5p4.Subs(d5p4.hugging_face(model), VOCABULARY - 1)
        ids = torch.full((1, length), VOCABULARY - 1)
        row: dict[str, Any] = {"dtype": dtype, "length": length, "parameters": sum(p.numel() for p in model.parameters())}
        row["denoiser"] = 64 * least(lambda d=denoiser, i=ids: d(i), 3)
        if dtype == "float32":
            row |= selection(length)
        rows.append(row)
    return rows


def selection(length: int) -> dict[str, float]:
    """Return CPU seconds of the parts of selection on a pool of 64, as they are and in float64 without numba."""
    generator = seeded(1)
    log_p = torch.log_softmax(2 * torch.randn(8, length, VOCABULARY, generator=generator), -1)
    common = torch.randn(1, length, WIDTH, generator=generator)
    hidden = common + 0.3 * torch.randn(64, length, WIDTH, generator=generator)
    masked, cosines = torch.ones(8, length, dtype=torch.bool), d5p4.gram(hidden)
    raw = torch.randn(64, generator=generator, dtype=torch.float64)
    select = d5p4.Select()

    def parts(precision: torch.dtype) -> dict[str, float]:
        return {
            "quality": 8 * least(lambda: d5p4.quality(log_p, "entropy", masked, True, precision), 3),
            "gram": least(lambda: d5p4.gram(hidden, precision), 3),
            "choice": least(lambda: select(raw, cosines, 8), 50),
        }

    parts(torch.float32)  # compiles
    found = parts(torch.float32)
    with without_numba():
        without = parts(torch.float32)
        exact = parts(torch.float64)
    return found | {f"{m}_torch": v for m, v in without.items()} | {f"{m}_exact": v for m, v in exact.items()}


def least(call: Callable[[], Any], times: int = 5) -> float:
    """Return the least CPU seconds of some calls."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def run(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Measure all selectors, or the steps where the specification has lengths."""
    if "lengths" in spec:
        return {"steps": steps(spec)}
    methods = dict(METHODS)
    if (theirs := dppy_method()) is not None:
        methods[DPPY] = theirs
    q, cosines = pool(spec, "random", 8, 8, 0)
    for method in methods.values():  # the first call loads libraries
        method(q, cosines, d5p4.kernel(q, cosines), 8, 0)
    rows = [row for k, w in spec["shapes"] for row in one_shape(spec, methods, k, w)]
    return {"rows": rows}


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
    """Return the time of a choice among 64 beside DPPy's."""
    found, steps_found = result("d5p4_selector"), result("d5p4_step")
    large = [r for r in found["rows"] if r["k"] * r["w"] == 64 and "seconds" in r]

    def of(method: str) -> float:
        times = [r["seconds"] for r in large if r["method"] == method]
        return statistics.median(times) if times else float("nan")

    rejected = [r["rejection"] for r in large if "rejection" in r]
    total = {key: sum(r[key] for r in rejected) for key in ("draws", "seconds", "kept", "pools")} if rejected else {}
    until = total["seconds"] / total["kept"] if total.get("kept") else float("nan")
    forward = min(s["denoiser"] / 64 for s in steps_found["steps"] if s["dtype"] == "float32")
    names = ("greedy MAP, one start", "greedy MAP", "greedy MAP, without numba", "greedy MAP, polished", "diverse beam, alpha 1", "k-DPP, own")
    lines = []
    for method in names:
        seconds = of(method)
        share = f"{100 * seconds / forward:.3f} %"
        lines.append([method, f"{1000 * seconds:.3f}", f"{of(DPPY) / seconds:.1f}", f"{until / seconds:.0f}", share])
    note = (
        f"\n\nMedian over pools of the least of five calls. One draw of DPPy's exact k-DPP, its eigendecomposition included, takes {1000 * of(DPPY):.2f} ms (median) and keeps no "
        f"partition. Drawn until a set keeps it, with one eigendecomposition: {total.get('draws', 0)} draws for {total.get('kept', 0)} "
        f"such sets in {total.get('pools', 0)} pools (given up after {found['spec'].get('most_draws')} draws in "
        f"{total.get('pools', 0) - total.get('kept', 0)}), {1000 * until:.0f} ms a set. One core. One forward: a single state of "
        f"{min(steps_found['spec']['lengths'])} tokens through the denoiser below, float32, {1000 * forward:.0f} ms."
    )
    header = ["choice of 8 among 64", "CPU ms", "DPPy, one draw / its", "DPPy until one per group / its", "of one forward"]
    return table(header, lines) + note


def step_table() -> str:
    """Return the parts of a whole step."""
    found = result("d5p4_step")["steps"]
    lines = []
    for row in found:
        own = next(r for r in found if r["length"] == row["length"] and "quality" in r)
        for name, end in (("as it is", ""), ("without numba", "_torch"), ("float64, without numba", "_exact")):
            parts = [own[m + end] for m in ("quality", "gram", "choice")]
            lines.append([
                f"{row['length']} tokens, {row['dtype']}: {name}", f"{row['denoiser']:.1f}", *(f"{1000 * p:.{2 if p < 0.01 else 0}f}" for p in parts),
                f"{100 * sum(parts) / row['denoiser']:.2f} %",
            ])  # fmt: skip
    note = (
        f"\n\nOne step on a pool of 8 × 8. The denoiser: a random Llama of SmolLM2-135M's shape ({found[0]['parameters'] / 1e6:.0f} M parameters, "
        f"vocabulary {VOCABULARY}), 64 states, in the dtype of the row; one core with AMX (bfloat16 products are quick on it). All positions "
        "masked, the most that quality reads: later steps read fewer. Choice: normalisation, kernel and greedy MAP from all starts."
    )
    header = ["", "64 forwards, CPU s", "quality ms", "Gram matrix ms", "choice ms", "selection / 64 forwards"]
    return table(header, lines) + note


TABLES: dict[str, Callable[[], str]] = {"d5p4_selector": selector_table, "d5p4_cost": cost_table, "d5p4_step": step_table}
