"""The few SVG elements and axes that the pictures are made of. Colours are classes, set by page.css."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from thrifty.budget import digits, format_bytes, format_count

CHARACTER = 6.3  # average width of a character at 11.5 pixels


def element(tag: str, content: str = "", /, **attributes: Any) -> str:
    """Return one element; numbers are shortened, texts escaped, a trailing underscore of a name dropped.

    >>> element("rect", x=1.2345, class_="bar")
    '<rect x="1.23" class="bar"/>'
    """
    parts = [tag] + [f'{_name(k)}="{_value(v)}"' for k, v in attributes.items() if v is not None]
    return f"<{' '.join(parts)}>{content}</{tag}>" if content else f"<{' '.join(parts)}/>"


def label(x: float, y: float, words: str, **attributes: Any) -> str:
    """Return a text whose baseline starts at (x, y)."""
    return element("text", escape(words), x=x, y=y, **attributes)


def titled(shape: str, words: str) -> str:
    """Return a shape with a text that shows when pointed at and is read aloud."""
    return element("g", f"{element('title', escape(words))}{shape}")


def picture(name: str, title: str, description: str, size: tuple[float, float], parts: Iterable[str]) -> str:
    """Return a whole picture with its text alternative.

    name: unique in the page; size: width and height in pixels.
    """
    width, height = size
    head = element("title", escape(title), id=f"{name}-t") + element("desc", escape(description), id=f"{name}-d")
    return element(
        "svg",
        head + "".join(parts),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        style=f"max-width:{width:.0f}px",
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
    )


def path(points: Sequence[tuple[float, float]], **attributes: Any) -> str:
    """Return straight lines from point to point."""
    return element("path", d="M" + " L".join(f"{_value(x)} {_value(y)}" for x, y in points), **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """Return one straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def short(words: str, width: float) -> str:
    """Return the text, cut with an ellipsis so that it fits in so many pixels."""
    room = int(width / CHARACTER)
    return words if len(words) <= room else words[: room - 1] + "…" if room > 1 else ""


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to pixels, with ticks at round numbers.

    >>> Axis(0, 100, 0, 200).at(25)
    50.0
    >>> [words for _, words in Axis(0, 65536, 0, 300, "B").ticks(4)]
    ['0', '16 KiB', '32 KiB', '48 KiB', '64 KiB']
    """

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    unit: str = ""  # "B", "" (a count), "score", "dB" or "%"
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a number."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Return about `most` round numbers on the axis, each with its text."""
        values = _log_ticks(self, most) if self.log else []
        if len(values) < 3:
            values = _linear_ticks(self.low, self.high, most, 2 if self.unit == "B" else 10)
        step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
        return [(v, in_unit(v, self.unit, step)) for v in values]


def axis_over(values: Sequence[float], start: float, end: float, unit: str) -> Axis:
    """Return an axis with some air around the values: logarithmic when they span more than a factor of eight."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 8 and unit in ("B", ""):
        room = (high / low) ** 0.07
        return Axis(low / room, high * room, start, end, unit, log=True)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(low - room if unit == "score" else max(0.0, low - room), high + room, start, end, unit)


def in_unit(value: float, unit: str, step: float = 0.0) -> str:
    """Return a number with its unit; `step` is the distance to the next one, for scores."""
    if value == 0:
        return "0"
    if unit == "B":
        return format_bytes(value)
    if unit == "":
        return format_count(value)
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step else None
    text = digits(value) if places is None else f"{value:.{places}f}"
    return f"{text} {unit}" if unit in ("%", "dB") else text


def overlaps(box: tuple[float, float, float, float], others: Iterable[tuple[float, float, float, float]]) -> bool:
    """Return whether a box (left, top, right, bottom) touches any of the others."""
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def _linear_ticks(low: float, high: float, most: int, base: int) -> list[float]:
    rough = (high - low) / most
    if base == 2:
        step = 2.0 ** math.ceil(math.log2(rough))
    else:
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(axis: Axis, most: int) -> list[float]:
    base = 2 if axis.unit == "B" else 10
    first, last = math.floor(math.log(axis.low, base)), math.ceil(math.log(axis.high, base))
    powers = [float(base) ** k for k in range(first, last + 1)]
    every = [p * m for p in powers for m in ((1, 2, 5) if base == 10 else (1,))]
    choices = [every, powers, powers[::2], powers[::3], powers[::4]]
    inside = [[v for v in choice if axis.low <= v <= axis.high] for choice in choices]
    return next((values for values in inside if len(values) <= most + 1), inside[-1])


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(str(value))
