"""The record of a run: what was done, what it cost before and after, and whether the budget is kept.

A Report is filled by the verbs (compress, optimize, deploy) and read as JSON, Markdown or one HTML file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from thrifty.budget import Budget, Violation
from thrifty.cost import Cost
from thrifty.errors import DataError, StoreError
from thrifty.report.charts import KINDS, Chart, Gallery, Line, Matrix
from thrifty.report.environment import environment

__all__ = [
    "Block", "Candidate", "Chart", "Gallery", "Layer", "Line", "Matrix", "Memory", "Parity", "Report", "Row", "Table",
    "environment", "write_bytes", "write_text",
]  # fmt: skip

SCHEMA = 1
V = TypeVar("V")


@dataclass(frozen=True)
class Row:
    """One step of a run and what the network takes after it."""

    step: str  # "start", "prune 0.5", "quantize 8", "deploy"
    cost: Cost
    score: float | None = None  # on the validation split, higher is better
    seconds: float | None = None  # that the step took
    knobs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    host_us: float | None = None  # measured microseconds of one inference of the PyTorch model on this machine


@dataclass(frozen=True)
class Candidate:
    """One recipe that was tried."""

    name: str
    cost: Cost
    recipe: str = ""  # TOML
    score: float | None = None  # on the validation split; None when it could not be tried
    feasible: bool = False  # within the budget
    pareto: bool = False  # nothing tried is at least as good in all respects and better in one
    chosen: bool = False
    seconds: float | None = None
    error: str = ""  # why it could not be tried


@dataclass(frozen=True)
class Layer:
    """What one layer takes, and how far its integers are from the float model; None means not known."""

    name: str
    module: str = ""  # dotted path in the PyTorch model
    op: str = ""
    shape: tuple[int, ...] = ()  # of the output, channels first
    macs: int | None = None
    weight_bytes: int | None = None  # all constants of the layer
    instructions: int | None = None  # of one inference on the target
    error_db: float | None = None  # 10 log10(signal power / error power), float against integer; inf = exact
    saturated: float | None = None  # share of the outputs at the ends of their range, 0..1


@dataclass(frozen=True)
class Block:
    """A piece of the arena: what lies there, and when."""

    name: str
    offset: int  # bytes from the start of the arena
    size: int  # bytes
    first: int  # first and last call at which it is alive, inclusive
    last: int


class _Plan(Protocol):
    @property
    def offsets(self) -> Mapping[str, int]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def lives(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def bound_bytes(self) -> int: ...


class _Call(Protocol):
    @property
    def name(self) -> str: ...


class _Program(Protocol):
    @property
    def calls(self) -> Sequence[_Call]: ...
    @property
    def buffers(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Memory:
    """The memory plan: which part of the arena is alive when."""

    blocks: tuple[Block, ...]
    arena_bytes: int
    bound_bytes: int  # the largest sum of simultaneously live bytes: no plan can be smaller
    calls: tuple[str, ...]  # names, in the order of execution

    @classmethod
    def from_plan(cls, plan: _Plan, program: _Program) -> Memory:
        """Return the plan of a program (deploy.program.Plan and Program) as a value of the report.

        Scratch memory, which the plan holds under the name of its call, is named "scratch of CALL".
        """
        blocks = []
        for name, offset in plan.offsets.items():
            first, last = plan.lives[name]
            label = name if name in program.buffers else f"scratch of {name}"
            blocks.append(Block(label, int(offset), int(plan.sizes[name]), int(first), int(last)))
        calls = tuple(call.name for call in program.calls)
        return cls(tuple(blocks), int(plan.arena_bytes), int(plan.bound_bytes), calls)


@dataclass(frozen=True)
class Parity:
    """How many real samples each engine ran, and on how many its output differed from the program's."""

    samples: Mapping[str, int]  # "torch", "program", "host C", "cortex-m4 (emulated)" -> samples
    mismatches: Mapping[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether every engine gave every byte."""
        return not any(self.mismatches.values())

    def __str__(self) -> str:
        ran = ", ".join(f"{engine} on {count:,}" for engine, count in self.samples.items())
        bad = ", ".join(f"{engine} differs on {count:,}" for engine, count in self.mismatches.items() if count)
        return f"{bad} ({ran} samples)" if bad else f"every byte equal: {ran} samples"


@dataclass(frozen=True)
class Table:
    """Any other table of the report: numbers, texts or None."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass
class Report:
    """The record of one run, filled as it goes.

    The verdict uses the cost of the last row, and the scores of the test split where they are known
    (`test_scores`), else those of the first and the last row that have one.

    >>> report = Report("compress Net", Budget(flash_bytes=65536, max_drop=0.01), seed=0)
    >>> _ = report.add("start", Cost(flash_bytes=250_000), score=0.981)
    >>> _ = report.add("quantize 8", Cost(flash_bytes=16_384), score=0.973, knobs={"bits": 8})
    >>> report.verdict
    'within budget: flash 16 of 64 KiB, score -0.008'
    """

    title: str = "thrifty"
    budget: Budget = field(default_factory=Budget)
    target: str = ""
    seed: int | None = None
    metric: str = "score"
    rows: list[Row] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    memory: Memory | None = None
    parity: Parity | None = None
    charts: list[Matrix | Chart | Gallery] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    headline: str = ""  # the one line of truth of a report without a budget
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # what it is -> path, relative to the report
    test_scores: tuple[float, float] | None = None  # reference and final model, on the test split
    interrupted: bool = False
    environment: dict[str, Any] = field(default_factory=environment)

    def add(
        self,
        step: str,
        cost: Cost,
        score: float | None = None,
        seconds: float | None = None,
        knobs: Mapping[str, Any] | None = None,
        note: str = "",
        host_us: float | None = None,
    ) -> Row:
        """Append a row and return it; see Row for the arguments."""
        row = Row(step, cost, score, seconds, dict(knobs or {}), note, host_us)
        self.rows.append(row)
        return row

    @property
    def cost(self) -> Cost:
        """What the network takes at the end: the cost of the last row."""
        return self.rows[-1].cost if self.rows else Cost()

    @property
    def scores(self) -> tuple[float, float] | None:
        """Scores of the reference and of the result, on the test split where it was used."""
        if self.test_scores is not None:
            return self.test_scores
        known = [row.score for row in self.rows if row.score is not None]
        return (known[0], known[-1]) if len(known) > 1 else None

    @property
    def score_drop(self) -> float | None:
        """Reference score minus final score, positive when worse; None when not known."""
        scores = self.scores
        return None if scores is None else scores[0] - scores[1]

    @property
    def violations(self) -> tuple[Violation, ...]:
        """The limits of the budget that are not kept."""
        return self.budget.check(self.cost, self.score_drop)

    @property
    def within_budget(self) -> bool:
        """Whether every limit is kept and every engine gave the same bytes."""
        return not self.violations and (self.parity is None or self.parity.clean)

    @property
    def verdict(self) -> str:
        """The one line of truth."""
        if self.headline and not self.budget.limits:
            return f"{self.headline} (interrupted)" if self.interrupted else self.headline
        line = self.budget.verdict(self.cost, self.score_drop, "test" if self.test_scores else "")
        if self.parity is not None and not self.parity.clean:
            line = f"NOT equal on all engines: {self.parity}; {line}"
        return f"{line} (interrupted)" if self.interrupted else line

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, verdict and violations included.

        Raises DataError naming every number that is NaN.
        """
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "within_budget": self.within_budget,
            "violations": [str(v) for v in self.violations],
        }
        values |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain: dict[str, Any] = _plain(values)
        if bad := list(_nan_paths(plain, "report")):
            raise DataError(f"a report holds no NaN, but found it at: {', '.join(bad)}")
        return plain

    def to_json(self) -> str:
        """Return the report as JSON text; floats read back to the same bits, and inf is the text "inf"."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that to_json wrote.

        Raises DataError when the text is no report or its schema is unknown.
        """
        from thrifty.report.reading import read_report

        return read_report(text)

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        from thrifty.report.text import markdown

        return markdown(self)

    def to_html(self) -> str:
        """Return the report as one HTML file that needs nothing else: no script, no link, no font."""
        from thrifty.report.page import page

        return page(self)

    def write(self, folder: str | Path) -> Path:
        """Write report.json, report.md and report.html, each whole or not at all, and return the last path.

        Raises StoreError when the folder cannot be written.
        """
        folder = Path(folder)
        texts = {
            "report.json": self.to_json(),
            "report.md": self.to_markdown(),
            "report.html": self.to_html(),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        return folder / "report.html"


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all (see write_bytes)."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file whole or not at all: to a temporary file beside it, then renamed.

    Raises StoreError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as err:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {err.strerror or err}") from err
    return path


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _plain(value: Any) -> Any:
    """Return dataclasses, mappings, sequences and numbers as JSON values; anything else as its text."""
    if isinstance(value, (Cost, Budget)):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": KINDS[type(value)]} if type(value) in KINDS else {}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a NumPy or torch scalar
        return _plain(value.item())
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _nan_paths(value: Any, path: str) -> Iterable[str]:
    if isinstance(value, float) and math.isnan(value):
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _nan_paths(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _nan_paths(inner, f"{path}[{index}]")
