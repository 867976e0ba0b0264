"""What is printed: tables and the line of truth on stdout, progress and remarks on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from thrifty.report import Report, Table
from thrifty.report.text import score_text, steps_table

Progress = Callable[[int, int, str], None]


def say(words: str = "") -> None:
    """Print a line of the answer."""
    sys.stdout.write(f"{words}\n")


def remark(words: str) -> None:
    """Print a line beside the answer."""
    sys.stderr.write(f"thrifty: {words}\n")


def table_text(table: Table) -> str:
    """Return a table in aligned columns: numbers to the right, the first column and texts to the left.

    >>> print(table_text(Table("", ("step", "MACs"), [("start", "416k"), ("prune 0.5", "9k")])))
    step       MACs
    start      416k
    prune 0.5    9k
    """
    cells = [[str(c) for c in table.columns]] + [["–" if v is None else str(v) for v in row] for row in table.rows]
    if not cells[0]:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [i > 0 and all(_numeric(row[i]) for row in cells[1:]) for i in range(len(widths))]
    lines = (
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def finish(report: Report, as_json: bool, where: str = "") -> int:
    """Print steps, notes and the line of truth, or JSON, and return the exit code; where: such as "report: FILE"."""
    if as_json:
        sys.stdout.write(report.to_json())
        return 0 if report.within_budget else 1
    if report.rows:
        say(table_text(steps_table(report)))
    for note in report.notes:
        say(f"note: {note}")
    if report.test_scores is not None:
        before, after = report.test_scores
        say(f"test split, used once: {report.metric} {score_text(before)} as given, {score_text(after)} at the end")
    if report.parity is not None:
        say(f"parity: {report.parity}")
    say(f"{report.verdict}     {where}" if where else report.verdict)
    return 0 if report.within_budget else 1


@contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
    """Give a function (done, total, text) that moves a bar on stderr; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(title), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def move(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        yield move


def _numeric(value: Any) -> bool:
    text = str(value)
    return text in ("", "–", "exact") or text[0].isdigit() or (text[0] in "+-" and text[1:2].isdigit())
