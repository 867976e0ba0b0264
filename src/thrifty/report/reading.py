"""Reports back from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from thrifty.budget import Budget
from thrifty.cost import Cost
from thrifty.errors import DataError, ThriftyError
from thrifty.report import SCHEMA, Block, Candidate, Layer, Memory, Parity, Report, Row, Table
from thrifty.report.charts import read_chart

DERIVED = ("schema", "verdict", "within_budget", "violations")
SIMPLE = (
    "title", "target", "seed", "metric", "headline", "notes", "files", "interrupted", "environment",
)  # fmt: skip


def read_report(text: str) -> Report:
    """Return the report that Report.to_json wrote; raises DataError when it is none, or of an unknown schema."""
    try:
        values = json.loads(text)
    except ValueError as err:
        raise DataError(f"this is no report of thrifty: {err}") from err
    if not isinstance(values, dict) or "schema" not in values:
        raise DataError("this is no report of thrifty: it has no 'schema'")
    if values["schema"] != SCHEMA:
        raise DataError(f"report schema {values['schema']} is unknown to this thrifty, which reads schema {SCHEMA}")
    known = {f.name for f in dataclasses.fields(Report)} | set(DERIVED)
    if extra := sorted(set(values) - known):
        raise DataError(f"the report has unknown entries: {', '.join(extra)}")
    try:
        return _report(values)
    except (KeyError, TypeError, ValueError, AttributeError, ThriftyError) as err:
        raise DataError(f"the report is damaged: {type(err).__name__}: {err}") from err


def _report(values: dict[str, Any]) -> Report:
    scores = values.get("test_scores")
    memory, parity = values.get("memory"), values.get("parity")
    return Report(
        budget=Budget(**values["budget"]),
        rows=[Row(**{**row, "cost": Cost(**row["cost"])}) for row in values["rows"]],
        candidates=[Candidate(**{**c, "cost": Cost(**c["cost"])}) for c in values["candidates"]],
        layers=[_layer(layer) for layer in values["layers"]],
        memory=None if memory is None else _memory(memory),
        parity=None if parity is None else Parity(**parity),
        charts=[read_chart(c) for c in values.get("charts", [])],
        tables=[Table(t["title"], tuple(t["columns"]), t["rows"], t["note"]) for t in values["tables"]],
        test_scores=None if scores is None else (float(scores[0]), float(scores[1])),
        **{name: values[name] for name in SIMPLE if name != "headline" or name in values},
    )


def _layer(values: dict[str, Any]) -> Layer:
    error = values.get("error_db")
    error = math.inf if error == "inf" else -math.inf if error == "-inf" else error
    return Layer(**{**values, "shape": tuple(values["shape"]), "error_db": error})


def _memory(values: dict[str, Any]) -> Memory:
    blocks = tuple(Block(**block) for block in values["blocks"])
    return Memory(blocks, values["arena_bytes"], values["bound_bytes"], tuple(values["calls"]))
