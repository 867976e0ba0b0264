"""The pictures of a report: tried recipes, layers, memory plan, float-to-integer error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thrifty.budget import digits, format_bytes
from thrifty.report import Block, Candidate, Layer, Memory, Report
from thrifty.report.svg import (
    CHARACTER,
    Axis,
    axis_over,
    element,
    in_unit,
    label,
    line,
    overlaps,
    path,
    picture,
    short,
    titled,
)
from thrifty.report.text import decibels

COSTS = {"flash_bytes": ("flash", "B"), "ram_bytes": ("RAM", "B"), "instructions": ("instructions", "")}
Box = tuple[float, float, float, float]

# --- tried recipes ---------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 350.0, 300.0
LEFT, TOP, RIGHT, BOTTOM = 54.0, 30.0, 336.0, 252.0


def scatters(report: Report) -> list[str]:
    """Return one picture for each of flash, RAM and instructions that is known of any tried recipe."""
    return [made for name in COSTS if (made := scatter(report, name))]


def scatter(report: Report, cost: str) -> str:
    """Return score against one cost for all tried recipes; empty text when nothing is known.

    cost: a field of Cost. Recipes whose score is far below the rest are drawn at the lower edge.
    """
    tried = [c for c in report.candidates if c.score is not None and getattr(c.cost, cost) is not None]
    if not tried:
        return ""
    word, unit = COSTS[cost]
    limit = getattr(report.budget, cost)
    reference = _reference(report, cost)
    xs = [float(getattr(c.cost, cost)) for c in tried] + [float(v) for v in (limit, reference[0]) if v is not None]
    x = axis_over(xs, LEFT, RIGHT, unit)
    y = _score_axis(tried, reference[1], report.budget.max_drop)
    floor = None if reference[1] is None or report.budget.max_drop is None else reference[1] - report.budget.max_drop
    inside = [c for c in tried if _score(c) >= y.low]
    front = _front(tried, cost, x, y)
    parts = [
        *_allowed_region(x, y, limit, floor),
        *_frame(x, y, word, report.metric),
        *_limits(x, y, limit, floor, unit),
        path(front, class_="front") if len(front) > 1 else "",
        *(_mark(c, cost, x, y, unit) for c in sorted(tried, key=lambda c: (c.chosen, c.pareto, c.feasible))),
        _start_mark(reference, x, y, unit),
        *_chosen_label(tried, cost, x, y, front),
    ]
    description = (
        f"{len(tried)} recipes, {sum(c.feasible for c in tried)} within the budget, "
        f"{len(tried) - len(inside)} below the shown scores."
    )
    return picture(f"try-{cost}", f"{report.metric} against {word}", description, (WIDTH, HEIGHT), parts)


def _score(candidate: Candidate) -> float:
    return candidate.score if candidate.score is not None else -math.inf


def _reference(report: Report, cost: str) -> tuple[float | None, float | None]:
    if not report.rows:
        return None, None
    return getattr(report.rows[0].cost, cost), report.rows[0].score


def _score_axis(tried: Sequence[Candidate], reference: float | None, drop: float | None) -> Axis:
    scores = sorted(_score(c) for c in tried)
    top = max([scores[-1]] + ([reference] if reference is not None else []))
    spread = max(top - scores[len(scores) // 4], 3 * (drop or 0.0), 1e-3)
    shown = [s for s in scores if s >= top - 3 * spread] + [top]
    if reference is not None and drop is not None:
        shown.append(max(reference - drop, top - 3 * spread))
    return axis_over(shown, BOTTOM, TOP, "score")


def _allowed_region(x: Axis, y: Axis, limit: float | None, floor: float | None) -> list[str]:
    if limit is None and floor is None:
        return []
    right = RIGHT if limit is None else x.at(limit)
    bottom = BOTTOM if floor is None else min(BOTTOM, y.at(floor))
    return [element("rect", x=LEFT, y=TOP, width=right - LEFT, height=bottom - TOP, class_="allowed")]


def _frame(x: Axis, y: Axis, word: str, metric: str) -> list[str]:
    parts = []
    for value, words in y.ticks(5):
        parts += [line(LEFT, y.at(value), RIGHT, y.at(value), "grid")]
        parts += [label(LEFT - 7, y.at(value) + 4, words, class_="tick end")]
    last = -math.inf
    for value, words in x.ticks(5):
        half = len(words) * CHARACTER / 2
        if x.at(value) - half < last + 6:
            continue
        last = x.at(value) + half
        parts += [line(x.at(value), BOTTOM, x.at(value), BOTTOM + 4, "axis")]
        parts += [label(x.at(value), BOTTOM + 17, words, class_="tick middle")]
    parts += [path([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], class_="axis")]
    scale = ", logarithmic" if x.log else ""
    parts += [label((LEFT + RIGHT) / 2, BOTTOM + 38, f"{word}{scale}", class_="name middle")]
    return [*parts, label(LEFT - 40, 14, metric, class_="name")]


def _limits(x: Axis, y: Axis, limit: float | None, floor: float | None, unit: str) -> list[str]:
    parts = []
    if limit is not None:
        at = x.at(limit)
        words = f"limit {in_unit(limit, unit)}"
        half = len(words) * CHARACTER / 2
        middle = min(max(at, LEFT + 30 + half), RIGHT + 12 - half)
        parts += [line(at, TOP - 6, at, BOTTOM, "limit"), label(middle, TOP - 11, words, class_="limit-name middle")]
    if floor is not None and floor >= y.low:
        parts += [line(LEFT, y.at(floor), RIGHT, y.at(floor), "limit")]
    return parts


def _front(tried: Sequence[Candidate], cost: str, x: Axis, y: Axis) -> list[tuple[float, float]]:
    """Return the staircase through the recipes that nothing tried beats in this picture's two numbers."""
    best = -math.inf
    points: list[tuple[float, float]] = []
    for candidate in sorted(tried, key=lambda c: (getattr(c.cost, cost), -_score(c))):
        if _score(candidate) <= best or _score(candidate) < y.low:
            continue
        best = _score(candidate)
        at = (x.at(getattr(candidate.cost, cost)), y.at(best))
        points += [(at[0], points[-1][1]), at] if points else [at]
    return points


def _mark(candidate: Candidate, cost: str, x: Axis, y: Axis, unit: str) -> str:
    px, score = x.at(getattr(candidate.cost, cost)), _score(candidate)
    kind = "chosen" if candidate.chosen else "pareto" if candidate.pareto else "tried"
    fits = "fits" if candidate.feasible else "fails"
    if score < y.low:
        shape = path(
            [(px - 4, BOTTOM - 9), (px + 4, BOTTOM - 9), (px, BOTTOM - 2), (px - 4, BOTTOM - 9)],
            class_=f"mark {kind} {fits}",
        )
    else:
        shape = element("circle", cx=px, cy=y.at(score), r=6 if candidate.chosen else 4, class_=f"mark {kind} {fits}")
    words = f"{candidate.name}: score {score:.4f}, {in_unit(getattr(candidate.cost, cost), unit)}"
    return titled(shape, f"{words}, {'within' if candidate.feasible else 'outside'} the budget")


def _start_mark(reference: tuple[float | None, float | None], x: Axis, y: Axis, unit: str) -> str:
    cost, score = reference
    if cost is None or score is None or score < y.low:
        return ""
    px, py = x.at(cost), y.at(score)
    diamond = path([(px, py - 6), (px + 6, py), (px, py + 6), (px - 6, py), (px, py - 6)], class_="mark start")
    return titled(diamond, f"the model as given: score {score:.4f}, {in_unit(cost, unit)}")


def _chosen_label(
    tried: Sequence[Candidate], cost: str, x: Axis, y: Axis, front: Sequence[tuple[float, float]]
) -> list[str]:
    """Write the name of the chosen recipe where it hides no mark, and no line if there is such a place."""
    chosen = next((c for c in tried if c.chosen and _score(c) >= y.low), None)
    if chosen is None:
        return []
    marks = [_around(x.at(getattr(c.cost, cost)), y.at(_score(c)), 5) for c in tried if _score(c) >= y.low]
    lines = [
        (min(ax, bx) - 2, min(ay, by) - 2, max(ax, bx) + 2, max(ay, by) + 2)
        for (ax, ay), (bx, by) in itertools.pairwise(front)
    ]
    px, py = x.at(getattr(chosen.cost, cost)), y.at(_score(chosen))
    texts = [short(chosen.name, 190), short(chosen.name, 130)]
    for words, taken in [(t, marks + lines) for t in texts] + [(t, marks) for t in texts]:
        width = len(words) * CHARACTER
        beside = [(px + 11, py + 4), (px - 11 - width, py + 4)]
        around = [(px + dx, py + dy) for dy in (-12, 20, -24) for dx in (4, -width / 2, -width - 4)]
        places = beside + around if len(taken) > len(marks) else around + beside
        for left, base in places:
            box = (left, base - 11, left + width, base + 3)
            inside = box[0] > LEFT + 2 and box[2] < WIDTH - 2 and box[1] > TOP and box[3] < BOTTOM
            if inside and not overlaps(box, taken):
                return [label(left, base, words, class_="chosen-name")]
    return []


def _around(x: float, y: float, reach: float) -> Box:
    return (x - reach, y - reach, x + reach, y + reach)


# --- bars per layer --------------------------------------------------------------------------------------------

ROW = 21.0
PAGE = 1000.0


@dataclass(frozen=True)
class Bars:
    """One column of bars."""

    title: str
    unit: str
    values: tuple[float | None, ...]
    kind: str  # class that colours it
    words: Callable[[float], str]


def layer_bars(layers: Sequence[Layer]) -> str:
    """Return MACs, bytes and instructions of each layer; empty text when none is known."""
    columns = [
        Bars("MACs", "", tuple(x.macs for x in layers), "a", lambda v: in_unit(v, "")),
        Bars("constants", "B", tuple(x.weight_bytes for x in layers), "b", format_bytes),
        Bars("instructions", "", tuple(x.instructions for x in layers), "c", lambda v: in_unit(v, "")),
    ]
    return _bars("layers", "What each layer takes", layers, columns)


def error_bars(layers: Sequence[Layer]) -> str:
    """Return the float-to-integer error and the saturation of each layer; empty text when none is known."""
    saturated = tuple(None if x.saturated is None else 100 * x.saturated for x in layers)
    columns = [
        Bars("signal to error (higher is better)", "dB", tuple(x.error_db for x in layers), "a", decibels),
        Bars("outputs at the ends of their range", "%", saturated, "d", lambda v: f"{digits(v, 2)} %"),
    ]
    measured = [i for i, x in enumerate(layers) if x.error_db is not None or x.saturated is not None]
    kept = [layers[i] for i in measured]
    columns = [Bars(c.title, c.unit, tuple(c.values[i] for i in measured), c.kind, c.words) for c in columns]
    return _bars("errors", "Float against integer, per layer", kept, columns)


def _bars(name: str, title: str, layers: Sequence[Layer], columns: Sequence[Bars]) -> str:
    columns = [c for c in columns if any(v is not None for v in c.values)]
    if not layers or not columns:
        return ""
    names = min(250.0, max(len(layer.name) for layer in layers) * CHARACTER + 14)
    width = (PAGE - names) / len(columns)
    height = 30 + ROW * len(layers) + 24
    parts = []
    for index, layer in enumerate(layers):
        y = 30 + ROW * index
        if index % 2:
            parts.append(element("rect", x=0, y=y, width=PAGE, height=ROW, class_="stripe"))
        full = f"{layer.module or layer.name}: {layer.op} {layer.shape or ''}".rstrip(" :")
        parts.append(titled(label(names - 10, y + 15, short(layer.name, names - 8), class_="tick end"), full))
    for index, column in enumerate(columns):
        parts += _column(column, layers, names + index * width, width)
    rows = ", ".join(c.title for c in columns)
    return picture(name, title, f"{rows} of {len(layers)} layers, in the order of execution.", (PAGE, height), parts)


def _column(column: Bars, layers: Sequence[Layer], left: float, width: float) -> list[str]:
    bottom = 30 + ROW * len(layers)
    top = max((v for v in column.values if v is not None and v > 0 and math.isfinite(v)), default=1.0)
    axis = Axis(0, top, left, left + width - 76, column.unit)
    parts = [label(left, 16, column.title, class_="name")]
    for tick, words in axis.ticks(3):
        parts += [line(axis.at(tick), 26, axis.at(tick), bottom, "grid")]
        parts += [label(axis.at(tick), bottom + 16, words, class_="tick middle" if tick else "tick")]
    for index, (layer, value) in enumerate(zip(layers, column.values, strict=True)):
        y = 30 + ROW * index
        if value is None:
            parts.append(label(left + 5, y + 15, "–", class_="tick"))
            continue
        length = axis.at(min(max(value, 0.0), top)) - left
        bar = element(
            "rect", x=left, y=y + 4, width=max(length, 1.0), height=ROW - 8, rx=1.5, class_=f"bar {column.kind}"
        )
        words = column.words(value)
        parts.append(titled(bar + label(left + length + 5, y + 15, words, class_="value"), f"{layer.name}: {words}"))
    return [*parts, line(left, 26, left, bottom, "axis")]


# --- memory plan -----------------------------------------------------------------------------------------------


def memory_plan(memory: Memory) -> str:
    """Return who is alive when: x = call, y = address."""
    if not memory.blocks or not memory.calls:
        return ""
    left, right, top, bottom = 64.0, PAGE - 118, 22.0, 342.0
    names = max(len(short(c, 150)) for c in memory.calls)
    y = Axis(0, max(memory.arena_bytes, 1), bottom, top, "B")
    band = (right - left) / len(memory.calls)
    parts = []
    for value, words in y.ticks(5):
        parts += [line(left, y.at(value), right, y.at(value), "grid")]
        parts += [label(left - 7, y.at(value) + 4, words, class_="tick end")]
    parts += _blocks(memory, left, band, y)
    parts += _calls(memory.calls, left, band, bottom)
    parts += [path([(left, top), (left, bottom), (right, bottom)], class_="axis")]
    parts += _levels(memory, left, right, y)
    parts += [label(left - 56, 12, "address", class_="name")]
    height = bottom + 18 + names * CHARACTER * 0.66 + 6
    words = (
        f"{len(memory.blocks)} buffers over {len(memory.calls)} calls in an arena of "
        f"{format_bytes(memory.arena_bytes)}; the live-set bound is {format_bytes(memory.bound_bytes)}."
    )
    return picture("memory", "Memory plan: who is alive when", words, (PAGE, height), parts)


def _blocks(memory: Memory, left: float, band: float, y: Axis) -> list[str]:
    last = len(memory.calls) - 1
    shapes: list[str] = []
    names: list[str] = []
    taken: list[Box] = []
    for index, block in enumerate(sorted(memory.blocks, key=lambda b: (b.first, b.offset))):
        first, end = max(0, block.first), min(last, block.last) + 1
        x0, x1 = left + band * first + 1, left + band * end - 1
        y0, y1 = y.at(block.offset + block.size), y.at(block.offset)
        kind = "scratch" if block.name.startswith("scratch of ") else f"hue{index % 6}"
        shape = element(
            "rect", x=x0, y=y0, width=max(x1 - x0, 1.0), height=max(y1 - y0, 1.0), rx=2, class_=f"block {kind}"
        )
        shapes.append(titled(shape, _alive(block, memory.calls, first, end - 1)))
        covered = [b.first for b in memory.blocks if first < b.first < end and _meet(block, b)]
        middle = (x0 + left + band * min([end, *covered])) / 2  # of the part that no later block covers
        words = short(block.name, 2 * (middle - x0) - 8)
        half, y_middle = len(words) * CHARACTER / 2, (y0 + y1) / 2
        box = (middle - half, y_middle - 7, middle + half, y_middle + 7)
        if len(words) > 2 and y1 - y0 >= 14 and not overlaps(box, taken):
            taken.append(box)
            names.append(label(middle, y_middle + 4, words, class_="block-name middle"))
    return shapes + names


def _meet(a: Block, b: Block) -> bool:
    """Whether two blocks share addresses."""
    return a.offset < b.offset + b.size and b.offset < a.offset + a.size


def _alive(block: Block, calls: Sequence[str], first: int, last: int) -> str:
    when = calls[first] if first == last else f"{calls[first]} to {calls[last]}"
    return f"{block.name}: {format_bytes(block.size)} at address {block.offset}, alive in {when}"


def _calls(calls: Sequence[str], left: float, band: float, bottom: float) -> list[str]:
    every = max(1, math.ceil(14 / band))
    parts = []
    for index, name in enumerate(calls):
        x = left + band * (index + 0.5)
        if index % every == 0:
            turn = f"rotate(-42 {x:.1f} {bottom + 14:.1f})"
            parts.append(label(x, bottom + 14, short(name, 150), class_="tick end", transform=turn))
    return parts


def _levels(memory: Memory, left: float, right: float, y: Axis) -> list[str]:
    arena, bound = y.at(memory.arena_bytes), y.at(memory.bound_bytes)
    size = format_bytes(memory.arena_bytes)
    if memory.arena_bytes == memory.bound_bytes:
        words = [(arena, f"arena {size}"), (arena + 15, "= live-set bound")]
    else:
        over = memory.arena_bytes / max(memory.bound_bytes, 1) - 1
        bound_text = f"bound {format_bytes(memory.bound_bytes)}"
        at = max(bound + 4, arena + 19)
        words = [(arena, f"arena {size}"), (at, bound_text), (at + 15, f"(arena +{digits(100 * over, 2)} %)")]
    parts = [line(left, arena, right + 4, arena, "arena"), line(left, bound, right + 4, bound, "bound")]
    return parts + [label(right + 9, at + 4, text, class_="tick") for at, text in words]
