"""The report as one HTML page that needs nothing else: the style and the pictures are inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from thrifty.budget import WORDS as LIMITS
from thrifty.budget import digits
from thrifty.report import Report, Table, charts, pictures, text
from thrifty.report.svg import element


def page(report: Report) -> str:
    """Return the whole page."""
    style = files("thrifty.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in _sections(report) if part)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(report: Report) -> list[str]:
    return [
        _head(report),
        _figures(report),
        _section("Steps", _steps(report)),
        _section("Tried recipes", _tried(report)),
        _section("Layers", _layers(report)),
        _section("Float against integer", _errors(report)),
        _section("Memory plan", _memory(report)),
        *(_section(c.title, _chart(c, f"chart{i}")) for i, c in enumerate(report.charts)),
        *(_section(t.title, _table(t)) for t in report.tables),
        _section("Files", _files(report)),
        _section("Made with", _table(text.environment_table(report), header=False)),
    ]


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _head(report: Report) -> str:
    kind = "yes" if report.within_budget and report.budget.limits else "no" if not report.within_budget else "none"
    made = " · ".join(
        part
        for part in (
            report.target,
            "" if report.seed is None else f"seed {report.seed}",
            f"thrifty {report.environment.get('thrifty', '')}",
            str(report.environment.get("time", ""))[:16].replace("T", " "),
        )
        if part
    )
    reasons = [str(v) for v in report.violations] + list(report.notes)
    points = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    lines = "".join(f"<p>{escape(line)}</p>" for line in text.summary_lines(report)[bool(report.target) :])
    return (
        f"<header>\n<p class=made>{escape(made)}</p>\n<h1>{escape(report.title)}</h1>\n"
        f'<p class="verdict {kind}"><span aria-hidden=true>{ {"yes": "✓", "no": "✗", "none": "·"}[kind] }</span>'
        f"{escape(report.verdict)}</p>\n"
        + (f"<ul class=reasons>{points}</ul>\n" if points else "")
        + f"<div class=facts>{lines}</div>\n</header>"
    )


def _figures(report: Report) -> str:
    """Return the figures before and after, with a meter for each limit."""
    if not report.rows:
        return ""
    before, after = report.rows[0].cost, report.cost
    cards = []
    shown = ("flash_bytes", "ram_bytes", "instructions", "macs", "params", "weight_bytes")
    changes = {name: (a, b) for name, a, b in text.cost_changes(before, after)}
    for name in shown:
        if getattr(after, name) is not None:
            old = changes[name][0] if name in changes and len(report.rows) > 1 else None
            cards.append(_card(report, name, old, getattr(after, name)))
    return f"<div class=cards>{_score_card(report)}{''.join(cards[:5])}</div>"


def _card(report: Report, name: str, before: float | None, after: float) -> str:
    words = text.WORDS[name]
    small = ""
    if before is not None and after and before != after:
        small = f"{text.cost_text(name, before)} before\n{_times(before / after)}"
    elif before is not None:
        small = "as before"
    limit = getattr(report.budget, name) if name in LIMITS else None
    used = ""
    if limit is not None:
        share = after / limit
        state = "over" if share > 1 else "fits"
        used = (
            f"<div class='meter {state}' aria-hidden=true><i style='width:{min(share, 1) * 100:.1f}%'></i></div>"
            f"<small>{digits(100 * share, 2 if share < 1 else 3)} % of {text.cost_text(name, limit)}</small>"
        )
    return _card_html(words, text.cost_text(name, after), small, used)


def _score_card(report: Report) -> str:
    if report.scores is None:
        return ""
    before, after = report.scores
    split = "test split" if report.test_scores is not None else "validation split"
    change = f"{after - before:+.4f} from {before:.4f}\n{split}"
    allowed = report.budget.max_drop
    used = "" if allowed is None else f"<small>allowed drop {digits(allowed)}</small>"
    return _card_html(report.metric, f"{after:.4f}", change, used)


def _card_html(name: str, value: str, small: str, extra: str) -> str:
    below = "".join(f"<small>{escape(one)}</small>" for one in small.splitlines())
    return f"<div class=card><h3>{escape(name)}</h3><b>{escape(value)}</b>{below}{extra}</div>"


def _times(ratio: float) -> str:
    """Return what before / after means in words; more is not hidden."""
    if 0.95 < ratio < 1.05:
        return f"{digits(100 * abs(1 - 1 / ratio), 2)} % {'less' if ratio > 1 else 'MORE'}"
    return f"{digits(ratio, 2 if ratio < 10 else 3)}× less" if ratio > 1 else f"{digits(1 / ratio, 2)}× MORE"


def _steps(report: Report) -> str:
    details = (f"<dt>{escape(step)}</dt><dd>{escape(words)}</dd>" for step, words in text.step_details(report))
    listed = "".join(details)
    return _table(text.steps_table(report)) + (f"<dl>{listed}</dl>" if listed else "")


def _tried(report: Report) -> str:
    drawn = pictures.scatters(report)
    table = text.candidates_table(report)
    if not table.rows:
        return ""
    grid = f"<div class=three>{''.join(drawn)}</div>{_LEGEND}" if drawn else ""
    return grid + _folded(f"All {len(table.rows)} recipes as a table", table)


def _layers(report: Report) -> str:
    table = text.layers_table(report)
    if not table.rows:
        return ""
    return _wide(pictures.layer_bars(report.layers)) + _folded(f"All {len(table.rows)} layers as a table", table)


def _errors(report: Report) -> str:
    drawn = pictures.error_bars(report.layers)
    return drawn and (
        "<p class=note>Signal to error is the power of the float output over the power of its difference to the "
        "integer output, 6 dB for each bit. Saturated is the share of outputs at the lowest or highest integer of "
        "their range; zeros after a ReLU do not count.</p>" + _wide(drawn)
    )


def _memory(report: Report) -> str:
    if report.memory is None or not report.memory.blocks:
        return ""
    return _wide(pictures.memory_plan(report.memory)) + _folded("All buffers as a table", text.memory_table(report))


def _chart(chart: charts.Matrix | charts.Chart | charts.Gallery, name: str) -> str:
    if isinstance(chart, charts.Gallery):
        return charts.gallery(chart)
    note = f"<p class=note>{escape(chart.note)}</p>" if chart.note else ""
    if isinstance(chart, charts.Matrix):
        return note + f"<div class=scroll>{charts.matrix(chart, name)}</div>"
    table = Table(chart.title, *charts.chart_rows(chart))
    return note + charts.chart(chart, name) + _folded("The same as a table", table)


def _files(report: Report) -> str:
    items = (
        f"<li>{escape(name)}: <a href='{quote(str(where), safe='/._-')}'>{escape(str(where))}</a></li>"
        for name, where in report.files.items()
    )
    return f"<ul>{''.join(items)}</ul>" if report.files else ""


def _wide(drawn: str) -> str:
    """Return a wide picture that scrolls on a narrow screen instead of shrinking."""
    return f"<div class='scroll wide'>{drawn}</div>" if drawn else ""


def _folded(title: str, table: Table) -> str:
    return f"<details><summary>{escape(title)}</summary>{_table(table)}</details>" if table.rows else ""


def _table(table: Table, header: bool = True) -> str:
    if not table.rows:
        return ""
    numeric = [all(_numeric(row[i]) for row in table.rows) for i in range(len(table.columns))]
    head = "".join(
        f"<th{' class=n' if n else ''}>{escape(c)}</th>" for c, n in zip(table.columns, numeric, strict=True)
    )
    rows = "".join(f"<tr>{_cells(row, numeric)}</tr>" for row in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    top = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f"<div class=scroll><table>{top}<tbody>{rows}</tbody></table></div>{note}"


def _cells(row: Sequence[Any], numeric: Sequence[bool]) -> str:
    return "".join(f"<td{' class=n' if n else ''}>{escape(_shown(v))}</td>" for v, n in zip(row, numeric, strict=True))


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return digits(value, 4) if math.isfinite(value) else str(value)
    return str(value)


def _numeric(value: Any) -> bool:
    shown = _shown(value)
    return shown in ("–", "exact") or shown[:1].isdigit() or shown[:2] in {f"-{d}" for d in range(10)}


def _legend() -> str:
    def item(mark: str, words: str) -> str:
        drawing = element("svg", mark, viewBox="0 0 16 16", aria_hidden="true")
        return f"<li>{drawing}{words}</li>"

    def dot(kind: str, radius: int = 4) -> str:
        return element("circle", cx=8, cy=8, r=radius, class_=f"mark {kind}")

    items = [
        item(dot("chosen fits", 6), "chosen"),
        item(dot("pareto fits"), "Pareto set"),
        item(dot("pareto fails"), "Pareto set, outside the budget"),
        item(dot("tried fits"), "within budget"),
        item(dot("tried fails"), "outside"),
        item(element("path", d="M8 2 L14 8 L8 14 L2 8 Z", class_="mark start"), "the model as given"),
        item(element("path", d="M0 11 H8 V5 H16", class_="front"), "best score so far"),
        item(element("path", d="M8 0 V16", class_="limit"), "limit"),
        item(element("path", d="M4 5 H12 L8 12 Z", class_="mark tried fails"), "below the shown scores"),
    ]
    return f"<ul class=legend>{''.join(items)}</ul>"


_LEGEND = _legend()
