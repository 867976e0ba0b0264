"""The tables of a report as plain values, and the report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from thrifty.budget import digits, format_bytes, format_count
from thrifty.cost import PROVENANCE, UNITS, Cost
from thrifty.report import Candidate, Report, Table
from thrifty.report.charts import Chart, chart_rows

WORDS = {
    "params": "params", "weight_bytes": "weights", "macs": "MACs", "activation_bytes": "activations",
    "flash_bytes": "flash", "ram_bytes": "RAM", "instructions": "instructions", "cycles": "cycles",
    "energy_uj": "energy",
}  # fmt: skip


def cost_text(name: str, value: float | None) -> str:
    """Return one number of a Cost as people read it; "–" when it is not known.

    >>> cost_text("flash_bytes", 16384), cost_text("macs", 61700), cost_text("energy_uj", 3.21), cost_text("macs", None)
    ('16 KiB', '61.7k', '3.21 uJ', '–')
    """
    if value is None:
        return "–"
    if UNITS[name] == "B":
        return format_bytes(value)
    return format_count(value) if not UNITS[name] else f"{digits(value)} {UNITS[name]}"


def score_text(score: float | None) -> str:
    """Return a score in four decimals; "–" when it is not known."""
    return "–" if score is None else f"{score:.4f}"


def decibels(value: float) -> str:
    """Return a signal-to-error ratio as people read it."""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact" if value > 0 else "no signal"


def steps_table(report: Report) -> Table:
    """Return what the network takes after each step, with a column for each number that is known of any."""
    names = [n for n in WORDS if any(getattr(row.cost, n) is not None for row in report.rows)]
    rows = []
    for row in report.rows:
        costs = [cost_text(n, getattr(row.cost, n)) for n in names]
        rows.append([row.step, *costs, score_text(row.score), _duration(row.host_us), _seconds(row.seconds)])
    columns = ["step", *(WORDS[n] for n in names), report.metric, "host time", "took"]
    how = "; ".join(f"{WORDS[n]} {PROVENANCE[n]}" for n in names)
    return without_empty(Table("Steps", tuple(columns), rows, f"How each number was obtained: {how}." if how else ""))


def step_details(report: Report) -> list[tuple[str, str]]:
    """Return (step, its knobs and its note) for each step that has some."""
    details = []
    for row in report.rows:
        knobs = ", ".join(f"{k} = {v}" for k, v in row.knobs.items() if not _empty(v))
        if words := "; ".join(part for part in (knobs, row.note) if part):
            details.append((row.step, words))
    return details


def details_table(report: Report) -> Table:
    """Return the knobs and notes of the steps."""
    return Table("Knobs", ("step", "knobs and notes"), step_details(report))


def candidates_table(report: Report) -> Table:
    """Return every recipe that was tried, the chosen and the Pareto set first."""
    names = [n for n in WORDS if any(getattr(c.cost, n) is not None for c in report.candidates)]
    rows = []
    for c in sorted(report.candidates, key=_rank):
        costs = [cost_text(n, getattr(c.cost, n)) for n in names]
        state = "chosen" if c.chosen else "Pareto" if c.pareto else ""
        fits = "failed" if c.error else "yes" if c.feasible else "no"
        rows.append([c.name, state, fits, score_text(c.score), *costs, _seconds(c.seconds), c.error])
    columns = ("recipe", "", "within budget", report.metric, *(WORDS[n] for n in names), "took", "why not")
    return without_empty(Table("All tried recipes", columns, rows))


def layers_table(report: Report) -> Table:
    """Return what each layer takes and how far its integers are from the float model."""
    rows = []
    for x in report.layers:
        error = "–" if x.error_db is None else decibels(x.error_db)
        share = "–" if x.saturated is None else f"{digits(100 * x.saturated, 2)} %"
        shape = " × ".join(map(str, x.shape))
        numbers = [
            cost_text("macs", x.macs),
            cost_text("flash_bytes", x.weight_bytes),
            cost_text("instructions", x.instructions),
        ]
        rows.append([x.name, x.module, x.op, shape, *numbers, error, share])
    columns = (
        "layer",
        "module",
        "operator",
        "output",
        "MACs",
        "constants",
        "instructions",
        "signal to error",
        "saturated",
    )
    return without_empty(Table("Layers", columns, rows))


def memory_table(report: Report) -> Table:
    """Return where each buffer lies in the arena, and when."""
    memory = report.memory
    rows: list[list[str]] = []
    for b in sorted(memory.blocks, key=lambda b: (b.first, b.offset)) if memory else ():
        rows.append([b.name, f"{b.offset:,}", f"{b.size:,}", f"{b.first}", f"{b.last}"])
    return Table("Memory plan", ("buffer", "address", "bytes", "first call", "last call"), rows)


def environment_table(report: Report) -> Table:
    """Return versions, platform, seed and revision."""
    rows = [["seed", "–" if report.seed is None else str(report.seed)]]
    rows += [[name, "–" if value is None else str(value)] for name, value in report.environment.items()]
    return Table("Made with", ("what", "which"), rows)


def without_empty(table: Table) -> Table:
    """Return the table without the columns that say nothing."""
    if not table.rows:
        return table
    kept = [i for i in range(len(table.columns)) if any(row[i] not in ("", "–", None) for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.title, tuple(table.columns[i] for i in kept), rows, table.note)


def markdown(report: Report) -> str:
    """Return the whole report as Markdown."""
    parts = [f"# {_md(report.title)}", f"**{_md(report.verdict)}**"]
    if report.violations:
        parts.append("\n".join(f"- {_md(str(v))}" for v in report.violations))
    if report.notes:
        parts.append("\n".join(f"- {_md(note)}" for note in report.notes))
    parts += _summary(report, _md)
    tables = [
        steps_table(report),
        details_table(report),
        candidates_table(report),
        layers_table(report),
        *(Table(c.title, *chart_rows(c), c.note) for c in report.charts if isinstance(c, Chart)),
        *report.tables,
    ]
    tables += [memory_table(report), environment_table(report)]
    parts += [_md_table(table) for table in tables if table.rows]
    if report.files:
        parts.append("## Files\n\n" + "\n".join(f"- {_md(k)}: `{v}`" for k, v in report.files.items()))
    return "\n\n".join(parts) + "\n"


def summary_lines(report: Report) -> list[str]:
    """Return the sentences about target, test scores, parity and memory that are known."""
    lines = []
    if report.target:
        lines.append(f"Target: {report.target}.")
    if report.test_scores is not None:
        before, after = report.test_scores
        lines.append(f"Test split, used once: {report.metric} {before:.4f} as given, {after:.4f} at the end.")
    if report.parity is not None:
        lines.append(f"Parity: {report.parity}.")
    if (m := report.memory) is not None:
        lines.append(f"Arena: {format_bytes(m.arena_bytes)}; live-set bound {format_bytes(m.bound_bytes)}.")
    return lines


def cost_changes(before: Cost, after: Cost) -> list[tuple[str, float, float]]:
    """Return (field of Cost, before, after) for each number known of both."""
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in WORDS)
    return [(name, a, b) for name, a, b in pairs if a is not None and b is not None]


def _rank(candidate: Candidate) -> tuple[bool, bool, bool, float]:
    score = -math.inf if candidate.score is None else candidate.score
    return (not candidate.chosen, not candidate.pareto, not candidate.feasible, -score)


def _summary(report: Report, quote: Callable[[str], str]) -> list[str]:
    lines = summary_lines(report)
    return ["\n".join(f"- {quote(one)}" for one in lines)] if lines else []


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (tuple, list, dict)) and not value)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{digits(seconds, 2)} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _duration(microseconds: float | None) -> str:
    if microseconds is None:
        return "–"
    return f"{digits(microseconds)} µs" if microseconds < 1000 else f"{digits(microseconds / 1000)} ms"


def _md(words: str) -> str:
    """Return words that Markdown and the HTML inside it leave alone."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in words)
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return _md(digits(value, 4) if isinstance(value, float) else str(value))


def _md_table(table: Table) -> str:
    def row(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(c) for c in cells) + " |"

    rule = "|" + " --- |" * len(table.columns)
    text = "\n".join([f"## {_md(table.title)}", "", row(table.columns), rule, *map(row, table.rows)])
    return f"{text}\n\n{_md(table.note)}" if table.note else text
