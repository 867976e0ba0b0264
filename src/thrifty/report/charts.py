"""Charts that any verb can add to a report: a matrix, curves with intervals, small pictures. Values, and their SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from thrifty.budget import digits
from thrifty.report.svg import CHARACTER, Axis, element, label, line, path, picture, short, titled

Number = float | None
MOST_NAMED = 60  # rows of a matrix that still have their names
MOST_COUNTED = 24  # columns of a matrix whose cells still show their number
PAGE = 1000.0


@dataclass(frozen=True)
class Matrix:
    """A table of numbers drawn as cells, darker where larger; with equal row and column names, a confusion."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Sequence[Sequence[Number]]  # (rows, columns), none negative
    row_name: str = "true"
    column_name: str = "answered"
    by_row: bool = True  # colour by the share of the row; else by the largest value of all
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a chart, with an optional band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[Number] = ()  # ends of the interval at each x
    high: Sequence[Number] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    unit: str = ""  # of y: "", "%", "dB"
    log_x: bool = False
    goal: Number = None  # a horizontal line
    mark: Number = None  # a vertical line
    mark_name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Small pictures with a line below each."""

    title: str
    pictures: Sequence[tuple[str, str]]  # (base64 of a JPEG, caption)
    note: str = ""


# --- matrix ----------------------------------------------------------------------------------------------------


def matrix(chart: Matrix, name: str = "matrix") -> str:
    """Return a matrix as SVG; name: unique in the page."""
    count, wide = len(chart.rows), len(chart.columns)
    if not count or not wide:
        return ""
    named = max(count, wide) <= MOST_NAMED
    room = min(170.0, CHARACTER * max(map(len, chart.rows)) + 12) if named else 12.0
    above = min(120.0, CHARACTER * max(map(len, chart.columns)) * 0.75 + 34) if named else 34.0
    cell = max(4.0, min(44.0, (PAGE - room - 60) / wide, 640.0 / count))
    left, top = room + 22, above
    parts = _matrix_names(chart, left, top, cell, room, above) if named else []
    middle = top + count * cell / 2
    turned = f"rotate(-90 12 {middle:.0f})"
    parts += [label(left + wide * cell / 2, 13, chart.column_name, class_="name middle")]
    parts += [label(12, middle, chart.row_name, class_="name middle", transform=turned)]
    same = chart.rows == chart.columns[:count]
    largest = max((v for row in chart.values for v in row if v is not None), default=0.0)
    for i, row in enumerate(chart.values):
        total = sum(v for v in row if v is not None) if chart.by_row else largest
        for j, value in enumerate(row):
            share = 0.0 if value is None or not total else value / total
            kind = "heat" if not same else "right" if i == j else "wrong"
            parts.append(_cell(chart, i, j, share, kind, (left + j * cell, top + i * cell, cell)))
    words = f"{count} rows by {wide} columns" + (f"; {chart.note}" if chart.note else "")
    return picture(name, chart.title, words, (left + wide * cell + 40, top + count * cell + 8), parts)


def _cell(chart: Matrix, i: int, j: int, share: float, kind: str, box: tuple[float, float, float]) -> str:
    x, y, cell = box
    value = chart.values[i][j]
    gap = 1.0 if cell > 10 else 0.0
    shape = element("rect", x=x, y=y, width=cell - gap, height=cell - gap, class_="cell")
    if share > 0:
        opacity = f"{0.10 + 0.80 * share:.3f}"
        shape += element(
            "rect", x=x, y=y, width=cell - gap, height=cell - gap, class_=f"cell-{kind}", fill_opacity=opacity
        )
    if value and len(chart.columns) <= MOST_COUNTED and cell >= 17:
        words = digits(value, 3)
        strong = " strong" if share > 0.55 else ""
        if len(words) * CHARACTER < cell + 4:
            shape += label(x + cell / 2, y + cell / 2 + 4, words, class_=f"value middle{strong}")
    shown = "–" if value is None else digits(value, 4)
    return titled(shape, f"{chart.row_name} {chart.rows[i]}, {chart.column_name} {chart.columns[j]}: {shown}")


def _matrix_names(chart: Matrix, left: float, top: float, cell: float, room: float, above: float) -> list[str]:
    parts = []
    size = "" if cell >= 12 else f"font-size:{max(6.5, cell * 0.95):.1f}px"
    style = size or None
    for i, words in enumerate(chart.rows):
        y = top + i * cell + cell / 2 + min(4.0, cell / 3)
        parts.append(label(left - 6, y, short(words, room), class_="tick end", style=style))
    for j, words in enumerate(chart.columns):
        x, y = left + j * cell + cell / 2, top - 5
        turned = f"rotate(-45 {x:.1f} {y:.1f})"
        parts.append(label(x, y, short(words, (above - 34) / 0.7 + 24), class_="tick", transform=turned, style=style))
    return parts


# --- lines -----------------------------------------------------------------------------------------------------

LEFT, TOP, RIGHT, BOTTOM = 64.0, 30.0, 700.0, 340.0


def chart(values: Chart, name: str = "chart") -> str:
    """Return lines with their bands as SVG; name: unique in the page."""
    lines = [one for one in values.lines if len(one.x)]
    if not lines:
        return ""
    ends = [v for one in lines for v in (*one.y, *one.low, *one.high) if v is not None]
    ends += [values.goal] if values.goal is not None else []
    x = _x_axis(values, lines)
    y = _y_axis(values, ends)
    parts = _frame(values, lines, x, y)
    if values.goal is not None:
        parts += [line(LEFT, y.at(values.goal), RIGHT, y.at(values.goal), "goal")]
        words = f"goal {digits(values.goal, 3)} {values.unit}".strip()
        parts += [label(LEFT + 6, y.at(values.goal) - 5, words, class_="goal-name")]
    if values.mark is not None:
        at = x.at(values.mark)
        parts += [line(at, TOP, at, BOTTOM, "here"), label(at + 5, TOP + 10, values.mark_name, class_="tick")]
    for i, one in enumerate(lines):
        parts += _line(values, one, i, x, y)
    if len(lines) > 1:
        parts += _legend(lines)
    words = "; ".join(f"{one.name}: {digits(one.y[0], 3)} to {digits(one.y[-1], 3)} {values.unit}" for one in lines)
    height = BOTTOM + 54 + (18 * len(lines) if len(lines) > 1 else 0)
    return picture(name, values.title, words, (RIGHT + 24, height), parts)


def _x_axis(values: Chart, lines: Sequence[Line]) -> Axis:
    every = [v for one in lines for v in one.x] + ([values.mark] if values.mark is not None else [])
    low, high = min(every), max(every)
    if low == high:
        low, high = (low / 2, high * 2) if values.log_x else (low - 1, high + 1)
    return Axis(low, high, LEFT + 16, RIGHT - 16, "", values.log_x)


def _y_axis(values: Chart, ends: Sequence[float]) -> Axis:
    low, high = min(ends), max(ends)
    room = (high - low) * 0.08 or 1.0
    low, high = low - room, high + room
    if values.unit == "%":
        low, high = max(0.0, low), min(100.0, high)
    return Axis(low, high, BOTTOM, TOP, "score" if not values.unit else values.unit)


def _frame(values: Chart, lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    parts = []
    for value, words in y.ticks(6):
        parts += [line(LEFT, y.at(value), RIGHT, y.at(value), "grid")]
        parts += [label(LEFT - 7, y.at(value) + 4, words, class_="tick end")]
    last = -math.inf
    points = sorted({v for one in lines for v in one.x})
    shown = [(v, f"{v:g}") for v in points] if len(points) <= 12 else x.ticks(8)
    for value, words in shown:
        half = len(words) * CHARACTER / 2
        parts += [line(x.at(value), BOTTOM, x.at(value), BOTTOM + 4, "axis")]
        if x.at(value) - half > last + 5:
            last = x.at(value) + half
            parts += [label(x.at(value), BOTTOM + 18, words, class_="tick middle")]
    parts += [path([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], class_="axis")]
    scale = ", logarithmic" if x.log else ""
    parts += [label((LEFT + RIGHT) / 2, BOTTOM + 40, f"{values.x_name}{scale}", class_="name middle")]
    return [*parts, label(LEFT - 48, 14, values.y_name, class_="name")]


def _line(values: Chart, one: Line, index: int, x: Axis, y: Axis) -> list[str]:
    kind = f"line{index % 4}"
    parts = []
    bounds = list(zip(one.x, one.low, one.high, strict=False))
    known = [(a, low, high) for a, low, high in bounds if low is not None and high is not None]
    if len(known) > 1:
        around = [(x.at(a), y.at(high)) for a, _, high in known]
        around += [(x.at(a), y.at(low)) for a, low, _ in reversed(known)]
        parts.append(path(around, class_=f"band {kind}"))
    for a, low, high in known:
        parts.append(line(x.at(a), y.at(low), x.at(a), y.at(high), f"whisker {kind}"))
    points = [(x.at(a), y.at(b)) for a, b in zip(one.x, one.y, strict=True)]
    parts.append(path(points, class_=f"curve {kind}") if len(points) > 1 else "")
    for (px, py), a, b in zip(points, one.x, one.y, strict=True):
        dot = element("circle", cx=px, cy=py, r=4, class_=f"dot {kind}")
        parts.append(titled(dot, f"{one.name}, {values.x_name} {a:g}: {digits(b, 3)} {values.unit}".strip()))
    return parts


def _legend(lines: Sequence[Line]) -> list[str]:
    parts = []
    for i, one in enumerate(lines):
        y = BOTTOM + 58 + 18 * i
        parts += [line(LEFT, y, LEFT + 22, y, f"curve line{i % 4}")] if len(one.x) > 1 else []
        parts += [element("circle", cx=LEFT + 11, cy=y, r=4, class_=f"dot line{i % 4}")]
        parts += [label(LEFT + 30, y + 4, one.name, class_="tick")]
    return parts


# --- small pictures --------------------------------------------------------------------------------------------


def gallery(chart: Gallery) -> str:
    """Return small pictures as HTML, each inside the page."""
    items = (
        f"<figure><img alt='' src='data:image/jpeg;base64,{escape(data)}'>"
        f"<figcaption>{escape(words)}</figcaption></figure>"
        for data, words in chart.pictures
    )
    note = f"<p class=note>{escape(chart.note)}</p>" if chart.note else ""
    return f"{note}<div class=gallery>{''.join(items)}</div>" if chart.pictures else ""


# --- as tables, and back from JSON -----------------------------------------------------------------------------


def chart_rows(values: Chart) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Return the columns and rows of a chart as a table: a row for each x."""
    lines = list(values.lines)
    columns = [values.x_name]
    for one in lines:
        columns += [one.name] + (["from", "to"] if any(v is not None for v in one.low) else [])
    rows = []
    for a in sorted({v for one in lines for v in one.x}):
        row: list[Any] = [f"{a:g}"]
        for one in lines:
            at = list(one.x).index(a) if a in one.x else None
            row.append(None if at is None else one.y[at])
            if any(v is not None for v in one.low):
                row += [None, None] if at is None else [one.low[at], one.high[at]]
        rows.append(row)
    return tuple(columns), rows


def read_chart(values: dict[str, Any]) -> Matrix | Chart | Gallery:
    """Return the chart of JSON values."""
    kind, given = values["kind"], {k: v for k, v in values.items() if k != "kind"}
    if kind == "matrix":
        return Matrix(**{**given, "rows": tuple(given["rows"]), "columns": tuple(given["columns"])})
    if kind == "chart":
        return Chart(**{**given, "lines": [Line(**one) for one in given["lines"]]})
    if kind == "gallery":
        return Gallery(given["title"], [(data, words) for data, words in given["pictures"]], given["note"])
    raise ValueError(f"chart of unknown kind {kind!r}")


KINDS: dict[type, str] = {Matrix: "matrix", Chart: "chart", Gallery: "gallery"}
