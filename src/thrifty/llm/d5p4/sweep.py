"""The trade-off between quality and diversity: selectors compared at equal forward passes, and their Pareto set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from thrifty.errors import DataError, KnobError
from thrifty.llm.d5p4.denoisers import Denoiser
from thrifty.llm.d5p4.sampling import Samples, sample
from thrifty.llm.d5p4.selection import Select
from thrifty.report.charts import Chart, Line

__all__ = ["Point", "grid", "pareto", "sweep", "trade_off"]

Measure = Callable[[Samples], Mapping[str, float]]


@dataclass(frozen=True)
class Point:
    """One selector (None: independent sampling), its metrics as means over seeds, and the forward passes of one run."""

    selector: Select | None
    metrics: Mapping[str, float]
    runs: tuple[Mapping[str, float], ...]  # one a seed: what intervals and paired comparisons are made from
    passes: int
    pareto: bool = False


def grid(
    betas: Sequence[float] = (), alphas: Sequence[float] = (), multiplicative: Sequence[float] = (), **options: Any
) -> list[Select | None]:
    """Return independent sampling, best of N, greedy beam, D5P4+ for each beta, D5P4x, diverse beams.

    betas: of D5P4+; multiplicative: betas of D5P4x; best of N takes k of the k w finished sequences. options: further
    fields of `Select`, the same for all.
    """
    found: list[Select | None] = [None, Select("best_of", **{**options, "partition": False})]
    found += [Select("greedy_beam", **options)]
    found += [Select(beta=b, **options) for b in betas]
    found += [Select(form="multiplicative", beta=b, **options) for b in multiplicative]
    return found + [Select("diverse_beam", alpha=a, **options) for a in alphas]


def sweep(
    denoiser: Denoiser, k: int, w: int, steps: int, selectors: Sequence[Select | None], measure: Measure,
    seeds: Sequence[int] = (0,), minimise: tuple[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None, **options: Any,
) -> list[Point]:  # fmt: skip
    """Return a point for every selector; with `minimise` (two metrics, such as perplexity and cosine) the Pareto set.

    All runs of a seed start from the same generator state and cost the same k w passes a step. measure: usually of
    `samples.representatives`. options: those of `sample` (start, process, window, ...). Raises KnobError, DataError.
    """
    if not seeds or not selectors:
        raise KnobError("a sweep needs at least one selector and one seed")
    points = []
    for number, selector in enumerate(selectors):
        runs, passes = [], 0
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            chosen = selector if selector is None else replace(selector, seed=seed)
            samples = sample(denoiser, k, w, steps, chosen, generator=generator, **options)
            runs.append(dict(measure(samples)))
            passes = samples.passes
            if progress is not None:
                progress(number * len(seeds) + len(runs), len(selectors) * len(seeds))
        names = runs[0]
        points.append(Point(selector, {m: sum(r[m] for r in runs) / len(runs) for m in names}, tuple(runs), passes))
    return pareto(points, minimise) if minimise else points


def pareto(points: Sequence[Point], minimise: tuple[str, ...]) -> list[Point]:
    """Return the points, each with whether none is at least as low in all the metrics and lower in one.

    Raises DataError where a point lacks a metric or has NaN in it.
    """
    bad = {m for m in minimise for p in points if math.isnan(p.metrics.get(m, math.nan))}
    if bad:
        names = ", ".join(points[0].metrics)
        raise DataError(f"no number for {', '.join(sorted(bad))} at some point; measured: {names}")
    values = [tuple(p.metrics[m] for m in minimise) for p in points]

    def beaten(own: tuple[float, ...]) -> bool:
        return any(v != own and all(a <= b for a, b in zip(v, own, strict=True)) for v in values)

    return [replace(p, pareto=not beaten(v)) for p, v in zip(points, values, strict=True)]


def trade_off(points: Sequence[Point], x: str, y: str) -> Chart:
    """Return a chart of two metrics (`thrifty.report.charts.chart` draws it): a line per method, from low knob to high.

    Points in the Pareto set, where it is marked, make a line of their own, from left to right.
    """
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(_family(point.selector), []).append(point)
    best = sorted((p for p in points if p.pareto), key=lambda p: p.metrics[x])
    named = [*lines.items(), *([("Pareto set", best)] if best else [])]
    drawn = [Line(name, [p.metrics[x] for p in line], [p.metrics[y] for p in line]) for name, line in named]
    passes = {p.passes for p in points}
    note = f"{passes.pop()} forward passes each" if len(passes) == 1 else "not at equal forward passes"
    return Chart(f"{y} against {x}", x, y, drawn, note=note)


def _family(selector: Select | None) -> str:
    if selector is None:
        return "independent"
    if selector.method in ("greedy_map", "map_set"):
        return "D5P4+" if selector.form == "additive" else "D5P4×"
    return "best of N" if selector.method == "best_of" else selector.method.replace("_", " ")
