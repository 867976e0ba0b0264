"""What a network may take: limits, how they are written, and what is said when they are met or not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from thrifty.cost import PROVENANCE, UNITS, Cost
from thrifty.errors import KnobError

BYTE_UNITS = {
    "": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3,
}  # fmt: skip
COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_NUMBER = re.compile(r"\s*([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*([A-Za-z%]*)\s*")
# field of Budget -> the word used in sentences; a field of the same name in Cost
WORDS = {
    "flash_bytes": "flash",
    "ram_bytes": "ram",
    "instructions": "instructions",
    "macs": "MACs",
    "params": "params",
}


def parse_bytes(text: str) -> int:
    """Return the bytes that `text` means: a number, bare or with B, KB, MB (1000) or KiB, MiB (1024).

    Raises KnobError for anything else; "64K" is refused because it could mean either.

    >>> parse_bytes("64KiB"), parse_bytes("64 KB"), parse_bytes("1.5MiB"), parse_bytes("300")
    (65536, 64000, 1572864, 300)
    """
    number, unit = _split(text, "a size, such as 64KiB")
    if unit.upper() in ("K", "M", "G"):
        clear = f"{number:g}{unit.upper()}"
        raise KnobError(f"'{text}' could mean two sizes; write {clear}iB (1024) or {clear}B (1000)")
    if unit.upper() not in BYTE_UNITS:
        raise KnobError(f"'{text}' is not a size; known units: B, KB, MB, GB (1000) and KiB, MiB, GiB (1024)")
    return _whole(number * BYTE_UNITS[unit.upper()], text, "a size")


def parse_count(text: str) -> int:
    """Return the count that `text` means: a whole number, or a number with k, M or G (powers of 1000).

    Raises KnobError for anything else.

    >>> parse_count("1.5M"), parse_count("20k"), parse_count("2e6"), parse_count("7_000")
    (1500000, 20000, 2000000, 7000)
    """
    number, unit = _split(text, "a count, such as 1.5M")
    if unit.upper() not in COUNT_UNITS:
        raise KnobError(f"'{text}' is not a count; known units: k, M, G (powers of 1000)")
    return _whole(number * COUNT_UNITS[unit.upper()], text, "a count")


def parse_drop(text: str) -> float:
    """Return a score drop in units of the score: "1%" and "1pt" (one point of a score from 0 to 1) are 0.01.

    A bare number is taken as it is. Raises KnobError for anything else.

    >>> parse_drop("1%"), parse_drop("0.5pt"), parse_drop("0.02")
    (0.01, 0.005, 0.02)
    """
    number, unit = _split(text, "a score drop, such as 1%")
    if unit not in ("", "%", "pt"):
        raise KnobError(f"'{text}' is not a score drop; write 1%, 1pt (both 0.01) or 0.01")
    return number / 100 if unit else number


def format_bytes(size: float) -> str:
    """Return a size as people read it, in three digits.

    >>> format_bytes(300), format_bytes(16384), format_bytes(67_000), format_bytes(3_000_000)
    ('300 B', '16 KiB', '65.4 KiB', '2.86 MiB')
    """
    step, unit = _byte_step(size)
    return f"{digits(size / step)} {unit}"


def format_count(count: float) -> str:
    """Return a count as people read it, in three digits.

    >>> format_count(0), format_count(950), format_count(61_700), format_count(4_160_000)
    ('0', '950', '61.7k', '4.16M')
    """
    step, unit = _count_step(count)
    return f"{digits(count / step)}{unit}"


def digits(value: float, significant: int = 3) -> str:
    """Return a number in so many significant digits, never in exponent form, without trailing zeros.

    >>> digits(65.43), digits(1234.5), digits(0.0123456), digits(16.0), digits(-0.5)
    ('65.4', '1234', '0.0123', '16', '-0.5')
    """
    if value == 0 or not math.isfinite(value):
        return str(value) if value else "0"
    places = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Violation:
    """One limit that is not kept, or that cannot be shown to be kept because nothing was measured."""

    limit: str  # flash, ram, instructions, MACs, params or score
    actual: float | None  # bytes, counts, or the drop of the score; None when not known
    allowed: float

    @property
    def over(self) -> float | None:
        """By how much the limit is exceeded, in its own unit; None when the number is not known."""
        return None if self.actual is None else self.actual - self.allowed

    def __str__(self) -> str:
        show = _shower(self.limit)
        if self.actual is None:
            return f"{self.limit} not {_how(self.limit)}; the limit is {show(self.allowed)}"
        over = self.actual - self.allowed
        share = f" ({_percent(over / self.allowed)})" if self.allowed else ""
        what = "score drop" if self.limit == "score" else self.limit
        return f"{what} {show(self.actual)} is {show(over)}{share} over the limit of {show(self.allowed)}"


@dataclass(frozen=True)
class Budget:
    """What a network may take; None means no limit.

    Raises KnobError when a limit is not a positive whole number, or max_drop is negative or not finite.

    >>> Budget(flash_bytes=65536, max_drop=0.01).verdict(Cost(flash_bytes=16384), 0.008)
    'within budget: flash 16 of 64 KiB, score -0.008'
    """

    flash_bytes: int | None = None  # code and constants of the linked image
    ram_bytes: int | None = None  # arena, other data and stack
    instructions: int | None = None  # of one inference on the target
    macs: int | None = None  # multiply-accumulates of one inference
    params: int | None = None  # stored weights and biases
    max_drop: float | None = None  # tolerated loss of score, in units of the score

    def __post_init__(self) -> None:
        for name in WORDS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
                raise KnobError(f"Budget.{name} is {value!r}; it must be a whole number above 0, or None")
        drop = self.max_drop
        if drop is not None and not (isinstance(drop, (int, float)) and math.isfinite(drop) and drop >= 0):
            raise KnobError(f"Budget.max_drop is {drop!r}; it must be a finite number of 0 or more, or None")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by field name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def check(self, cost: Cost, score_drop: float | None = None) -> tuple[Violation, ...]:
        """Return every limit that is not kept.

        score_drop: reference score minus score, positive when worse. A limited number that is not known is a
        violation too.

        >>> [str(v) for v in Budget(ram_bytes=1024, macs=10**6).check(Cost(ram_bytes=1536))]
        ['ram 1.5 KiB is 512 B (50 %) over the limit of 1 KiB', 'MACs not counted; the limit is 1M']
        """
        found = []
        for name, allowed in self.limits.items():
            actual = score_drop if name == "max_drop" else getattr(cost, name)
            if actual is None or _exceeds(actual, allowed):
                found.append(Violation(WORDS.get(name, "score"), actual, allowed))
        return tuple(found)

    def excess(self, cost: Cost, score_drop: float | None = None) -> float:
        """Return the sum over the violated limits of (excess / limit): 0 when every known number fits.

        It ranks what is nearest when nothing fits. A limit of 0 (max_drop) counts the excess itself.
        """
        known = [v for v in self.check(cost, score_drop) if v.over is not None]
        return sum((v.over or 0.0) / (v.allowed or 1.0) for v in known)

    def verdict(self, cost: Cost, score_drop: float | None = None, split: str = "") -> str:
        """Return the one line of truth: whether the limits are kept, and each number beside its limit.

        split: where the score was taken, when that is worth saying.
        """
        broken = {v.limit for v in self.check(cost, score_drop)}
        parts = [
            _beside(WORDS[name], getattr(cost, name), allowed, WORDS[name] in broken)
            for name, allowed in self.limits.items()
            if name != "max_drop"
        ]
        if not parts:
            parts = [
                f"{_word(name)} {_shower(_word(name))(getattr(cost, name))}"
                for name in ("flash_bytes", "ram_bytes", "instructions", "weight_bytes")
                if getattr(cost, name) is not None
            ]
        parts += _score_part(score_drop, self.max_drop, "score" in broken, split)
        head = "NOT within budget" if broken else "within budget" if self.limits else "no limit was set"
        return f"{head}: {', '.join(parts)}" if parts else head

    def to_dict(self) -> dict[str, Any]:
        """Return the limits that are set."""
        return dict(self.limits)


def _split(text: str, kind: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(str(text))
    if not match:
        raise KnobError(f"'{text}' is not {kind}")
    return float((match[1] + (match[2] or "")).replace("_", "")), match[3]


def _whole(value: float, text: str, kind: str) -> int:
    if not 1 <= value < 2**63:
        raise KnobError(f"'{text}' is not {kind} above 0")
    return int(value + 1e-6)


def _exceeds(actual: float, allowed: float) -> bool:
    # Score drops are differences of floats: 0.98 - 0.97 must not break a limit of 0.01.
    slack = 1e-9 if isinstance(allowed, float) else 0
    return not actual <= allowed + slack


def _word(name: str) -> str:
    return WORDS.get(name, name.removesuffix("_bytes").replace("weight", "weights"))


def _field(word: str) -> str:
    return next((name for name in UNITS if _word(name) == word), word)


def _how(word: str) -> str:
    return PROVENANCE.get(_field(word), "measured")


def _shower(word: str) -> Any:
    if word == "score":
        return digits
    return format_bytes if UNITS.get(_field(word)) == "B" else format_count


def _byte_step(size: float) -> tuple[int, str]:
    return next(((s, u) for s, u in ((1024**2, "MiB"), (1024, "KiB")) if abs(size) >= s), (1, "B"))


def _count_step(count: float) -> tuple[int, str]:
    return next(((s, u) for s, u in ((10**9, "G"), (10**6, "M"), (1000, "k")) if abs(count) >= s), (1, ""))


def _percent(share: float) -> str:
    return f"{digits(100 * share, 2)} %"


def _beside(word: str, actual: float | None, allowed: float, broken: bool) -> str:
    """Return "flash 16 of 64 KiB", with as many digits as it takes to show on which side the number lies."""
    bytes_ = UNITS.get(_field(word)) == "B"
    step, unit = _byte_step(allowed) if bytes_ else _count_step(allowed)
    gap = " " if bytes_ else ""
    limit = digits(allowed / step, 6)
    if actual is None:
        return f"{word} not {_how(word)} (limit {limit}{gap}{unit})"
    shown = [digits(actual / step, n) for n in (2, 3, 4, 6, 9, 12)]
    honest = (text for text in shown if (float(text) > allowed / step) == broken)
    return f"{word} {next(honest, shown[-1])} of {limit}{gap}{unit}"


def _score_part(drop: float | None, allowed: float | None, broken: bool, split: str) -> list[str]:
    if drop is None:
        return [] if allowed is None else [f"score drop not measured (limit {digits(allowed)})"]
    where = f" on {split}" if split else ""
    change = f"score {0.0 if drop == 0 else -drop:+.{4 if abs(drop) < 0.001 else 3}f}{where}"
    return [f"{change} (limit {digits(-allowed)})" if broken and allowed is not None else change]
