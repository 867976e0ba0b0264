"""Which range to loop: every plan against the model itself on the same examples, stopped early where it harms."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError, StoreError
from thrifty.llm.families import parts_of
from thrifty.llm.inner_loop.looping import Looped, loop
from thrifty.llm.inner_loop.plan import Plan
from thrifty.llm.inner_loop.replay import Call, recording, replaying
from thrifty.llm.loading import Batch, completion_losses

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int, str], None]
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.name{font-weight:600}"
    ".middle{text-anchor:middle}.end{text-anchor:end}"
)
LEAST = 8  # examples before a plan may be stopped


def likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean log-likelihood per learned token of each example, (b,), in nats; higher is better."""
    return -completion_losses(model, batch)


@dataclass(frozen=True)
class Cell:
    """One plan against the model itself: score with the loop minus score without it, on the same examples."""

    plan: Plan
    differences: Array  # (n,); fewer than all examples where it was stopped
    stopped: bool
    low: float  # ends of the 95 % bootstrap interval of the mean
    high: float

    @property
    def mean(self) -> float:
        """Mean difference; above zero the loop helps."""
        return float(self.differences.mean())


@dataclass(frozen=True)
class Scan:
    """What `scan` found, in the order of its plans."""

    base: Array  # (n,) scores of the model itself
    blocks: int
    cells: tuple[Cell, ...]

    def best(self) -> Cell:
        """Return the plan with the largest mean difference; chosen on these examples, so judge it on others."""
        return max(self.cells, key=lambda c: (c.mean, -c.plan.extra_share(self.blocks)))

    def matrix(self) -> Array:
        """Return mean differences by first block (rows) and last block (columns); NaN where there is no plan."""
        found = np.full((self.blocks, self.blocks), np.nan)
        for cell in self.cells:
            found[cell.plan.start, cell.plan.end - 1] = cell.mean
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        cells = [
            {"plan": json.loads(c.plan.to_json()), "mean": c.mean, "low": c.low, "high": c.high,
             "examples": len(c.differences), "stopped": c.stopped}
            for c in self.cells
        ]  # fmt: skip
        return {"base": float(self.base.mean()), "examples": len(self.base), "blocks": self.blocks, "cells": cells}

    def to_svg(self) -> str:
        """Return the heat map as SVG: blue helps, red harms, a dash where the plan was stopped early."""
        return heat_map(self)


def ranges(blocks: int, longest: int | None = None, passes: int = 2, **knobs: Any) -> list[Plan]:
    """Return a plan for every range of at most `longest` blocks.

    >>> len(ranges(4)), len(ranges(4, longest=1))
    (10, 4)
    """
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise KnobError(f"longest is {longest!r}; it must be a whole number of at least 1")
    reach = blocks if longest is None else longest
    spans = [(s, e) for s in range(blocks) for e in range(s + 1, min(s + reach, blocks) + 1)]
    return [Plan(s, e, passes, **knobs) for s, e in spans]


def scan(
    model: nn.Module, batches: Sequence[Batch], plans: Sequence[Plan], *,
    score: Callable[[nn.Module, Batch], Tensor] = likelihood, stop: float | None = 4.0, seed: int = 0,
    reuse: bool = False, state: str | Path | None = None, progress: Progress | None = None,
) -> Scan:  # fmt: skip
    """Score every plan and the model itself on the same examples.

    batches: of thrifty.llm.loading. score: (b,) per batch, higher is better. stop: a plan whose mean difference is so
    many standard errors below zero, after LEAST examples, is not run on the rest; None runs all. seed: of bootstrap.
    reuse: keep what every block returned for the model itself, (blocks + 1) states of all examples in memory; a plan
    then runs from its second pass on, about half the work, and gives the same bits. `score` must then call the model
    in the same way with and without a loop. state: a JSON file that keeps what is done; the same call goes on from it.
    The model is as before when it returns, also when it is interrupted.

    Raises DataError where there are no batches or scores are not finite, Incompatible where reuse cannot be.
    """
    if not batches:
        raise DataError("there are no examples to score")
    parts = parts_of(model)
    blocks = len(parts.blocks)
    for plan in plans:
        plan.refuse_beyond(blocks)
    for batch in batches:
        parts.refuse_unknown(batch.ids)
    kept = _State(state, _digest(model, batches, stop))
    base, calls = kept.get("base"), [list[Call]() for _ in batches]
    reuse = reuse and any(kept.get(plan.to_json()) is None for plan in plans)
    if base is None or reuse:
        base = _scores(model, batches, score, around=lambda i: recording(parts, calls[i]) if reuse else nullcontext())
        kept.put("base", base)
    cells = []
    for done, plan in enumerate(plans):
        key = plan.to_json()
        values = kept.get(key)
        if values is None:
            with loop(model, plan) as looped:
                values = _scores(model, batches, score, base, stop, _around(looped, calls if reuse else None))
            kept.put(key, values)
        differences = np.asarray(values) - np.asarray(base)[: len(values)]
        low, high = bootstrap(differences, seed)
        cells.append(Cell(plan, differences, len(values) < len(base), low, high))
        if progress is not None:
            progress(done + 1, len(plans), f"blocks {plan.start}..{plan.end - 1}: {cells[-1].mean:+.4f}")
    return Scan(np.asarray(base), blocks, tuple(cells))


def bootstrap(differences: Array, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of the mean of (n,) paired differences.

    >>> bootstrap(np.ones(5))
    (1.0, 1.0)
    """
    rng = np.random.default_rng(seed)
    means = [float(differences[rng.integers(0, len(differences), len(differences))].mean()) for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _around(looped: Looped, calls: list[list[Call]] | None) -> Callable[[int], AbstractContextManager[None]]:
    return lambda i: nullcontext() if calls is None else replaying(looped, calls[i])


def _scores(
    model: nn.Module, batches: Sequence[Batch], score: Any, base: Sequence[float] | None = None,
    stop: float | None = None, around: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> list[float]:  # fmt: skip
    found: list[float] = []
    for number, batch in enumerate(batches):
        with torch.inference_mode(), around(number):
            values = score(model, batch).double()
        if not torch.isfinite(values).all():
            count = int((~torch.isfinite(values)).sum())
            raise DataError(f"{count} scores are not finite; check the data and the model")
        found += values.tolist()
        if base is not None and stop is not None and len(found) >= LEAST:
            away = np.asarray(found) - np.asarray(base)[: len(found)]
            if away.mean() + stop * away.std(ddof=1) / len(away) ** 0.5 < 0:
                break
    return found


def _digest(model: nn.Module, batches: Sequence[Batch], stop: float | None) -> str:
    hashed = hashlib.sha256(repr((type(model).__name__, stop)).encode())
    for name, p in model.named_parameters():
        hashed.update(f"{name} {tuple(p.shape)} {p.detach().double().sum().item()!r}".encode())
    for batch in batches:
        hashed.update(batch.ids.cpu().numpy().tobytes() + batch.learned.cpu().numpy().tobytes())
    return hashed.hexdigest()


class _State:
    """What is done, in a file; without a path, in memory only."""

    def __init__(self, path: str | Path | None, digest: str) -> None:
        self.path = None if path is None else Path(path)
        self.content: dict[str, Any] = {"schema": 1, "digest": digest, "values": {}}
        if self.path is not None and self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                same = found["schema"] == 1 and found["digest"] == digest and isinstance(found["values"], dict)
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise StoreError(f"{self.path} is no state of a scan: {err!r}; name another file") from err
            if not same:
                raise StoreError(f"{self.path} is of another model, other data or another `stop`; name another file")
            self.content = found

    def get(self, key: str) -> list[float] | None:
        found: list[float] | None = self.content["values"].get(key)
        return found

    def put(self, key: str, values: list[float]) -> None:
        self.content["values"][key] = values
        if self.path is not None:
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_text(json.dumps(self.content), encoding="utf-8")
            os.replace(partial, self.path)


def heat_map(found: Scan, cell: int = 22) -> str:
    """Return the SVG of a scan: rows are first blocks, columns last blocks; colour is the mean difference."""
    from thrifty.report.svg import label, picture

    values = found.matrix()
    known = np.abs(values[np.isfinite(values)])
    top = float(np.quantile(known, 0.9)) if known.size and known.max() > 0 else 1.0
    left, above = 60, 46
    parts = [label(left + found.blocks * cell / 2, 14, "last block of the range", class_="name middle")]
    parts.append(label(14, above - 8, "first", class_="name"))
    marked = {(c.plan.start, c.plan.end - 1) for c in found.cells if c.stopped}
    for i in range(found.blocks):
        parts.append(label(left - 8, above + i * cell + cell * 0.7, str(i), class_="tick end"))
        parts.append(label(left + i * cell + cell / 2, above - 8, str(i), class_="tick middle"))
        for j in range(found.blocks):
            if np.isfinite(values[i, j]):
                parts.append(_square(left + j * cell, above + i * cell, cell, values[i, j], top, (i, j) in marked))
    words = f"mean difference to the model itself; full colour at {top:.3g}; blue helps, red harms, - stopped early"
    parts.append(label(14, above + found.blocks * cell + 20, words, class_="tick"))
    size = (max(left + found.blocks * cell + 20, 560), above + found.blocks * cell + 32)
    drawn = picture("scan", "Score of looped ranges", words, size, [f"<style>{STYLE}</style>", *parts])
    return drawn.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def _square(x: float, y: float, cell: int, value: float, top: float, stopped: bool) -> str:
    share = min(1.0, abs(value) / top)
    colour = (33, 102, 172) if value > 0 else (178, 24, 43)
    mixed = "#" + "".join(f"{round(255 + share * (c - 255)):02x}" for c in colour)
    place = f'x="{x:.0f}" y="{y:.0f}" width="{cell}" height="{cell}"'
    square = f'<rect {place} fill="{mixed}"><title>{value:+.4f}</title></rect>'
    dash = f'<path d="M{x + 7:.0f} {y + cell / 2:.0f}h{cell - 14}" stroke="#444"/>' if stopped else ""
    return square + dash
