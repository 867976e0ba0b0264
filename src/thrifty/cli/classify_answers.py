"""What `thrifty classify` says and writes: score with interval, confusions, predictions, report."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.cli.pictures import percent, thumbnail

if TYPE_CHECKING:
    from thrifty.report import Report

UNKNOWN = "unknown"
THUMBNAILS = 36  # wrong answers shown in the report at most
LEVEL = 0.95


@dataclass
class Answers:
    """The answers, row by row, and what is known of the truth."""

    files: list[str]
    labels: list[str]
    probabilities: list[float]  # of the best class
    p_values: list[float | None]  # how well the picture fits in with the known classes; None without --unknown
    truth: list[str | None]  # a class, UNKNOWN for the sub-folder of no class, None where it is not known
    classes: tuple[str, ...]
    paths: list[Path]
    remarks: list[str] = field(default_factory=list)

    @property
    def scored(self) -> list[int]:
        """Rows whose truth is known."""
        return [i for i, t in enumerate(self.truth) if t is not None]


# --- score -----------------------------------------------------------------------------------------------------


def score_of(answers: Answers, rate: float | None) -> dict[str, Any] | None:
    """Return accuracy with its interval, the confusions and the lines to print; None where no truth is known."""
    rows = answers.scored
    if not rows:
        return None
    truth, given = [str(answers.truth[i]) for i in rows], [answers.labels[i] for i in rows]
    strangers = UNKNOWN in truth
    right = sum(t == g for t, g in zip(truth, given, strict=True))
    low, high = _wilson(right, len(rows))
    names = answers.classes + ((UNKNOWN,) if strangers else ())
    columns = answers.classes + ((UNKNOWN,) if rate else ())
    pairs = Counter(zip(truth, given, strict=True))
    per_class = _per_class(names, truth, pairs)
    macro = sum(c["accuracy"] for c in per_class) / len(per_class)
    lines = [
        f"accuracy {percent(right / len(rows))} ({percent(low)} to {percent(high)}, 95 % interval over {len(rows)} "
        f"queries, this support), {percent(macro)} as the mean of classes"
    ]
    found: dict[str, Any] = {
        "accuracy": right / len(rows), "low": low, "high": high, "level": LEVEL, "queries": len(rows), "right": right,
        "mean_of_classes": macro, "classes": per_class, "rows": names, "columns": columns,
        "confusions": [[pairs[(t, g)] for g in columns] for t in names],
    }  # fmt: skip
    if strangers:
        part = [t == g for t, g in zip(truth, given, strict=True) if t != UNKNOWN]
        found["known_accuracy"] = sum(part) / len(part) if part else None
        ends = [percent(end) for end in _wilson(sum(part), len(part))] if part else []
        lines += (
            [f"of the known classes alone {percent(sum(part) / len(part))} ({ends[0]} to {ends[1]})"] if part else []
        )
    if rate:
        found |= _unknown_score(truth, given)
        lines += found["unknown_lines"]
    return {**found, "lines": lines}


def _per_class(names: tuple[str, ...], truth: list[str], pairs: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    counts = Counter(truth)
    found = []
    for name in names:
        if not counts[name]:
            continue
        wrong = [(n, g) for (t, g), n in pairs.items() if t == name and g != name]
        most = max(wrong, key=lambda w: (w[0], w[1]), default=(0, ""))
        found.append(
            {"class": name, "queries": counts[name], "right": pairs[(name, name)],
             "accuracy": pairs[(name, name)] / counts[name], "most_taken_for": most[1], "times": most[0]}
        )  # fmt: skip
    return found


def _unknown_score(truth: list[str], given: list[str]) -> dict[str, Any]:
    """Return how many known pictures were lost to "unknown", and how many strangers were found."""
    known = [g == UNKNOWN for t, g in zip(truth, given, strict=True) if t != UNKNOWN]
    strange = [g == UNKNOWN for t, g in zip(truth, given, strict=True) if t == UNKNOWN]
    found: dict[str, Any] = {"unknown_lines": []}
    for key, words, part in (
        ("known_lost", "of the known classes were called unknown", known),
        ("strangers_found", "of no known class were called unknown", strange),
    ):
        if part:
            low, high = _wilson(sum(part), len(part))
            found[key] = {"share": sum(part) / len(part), "low": low, "high": high, "queries": len(part)}
            ends = f"{percent(low)} to {percent(high)}"
            found["unknown_lines"].append(
                f"{sum(part)} of {len(part)} {words}: {percent(sum(part) / len(part))} ({ends})"
            )
    return found


def _wilson(right: int, count: int) -> tuple[float, float]:
    from thrifty.fewshot.generalization.forecasting import wilson

    low, high = wilson(right / count, count, LEVEL)
    return max(0.0, low), min(1.0, high)


# --- what is written -------------------------------------------------------------------------------------------


def rows_of(answers: Answers) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Return the columns and rows of the predictions: those that say something."""
    columns = ["file", "label", "probability"]
    with_p, with_truth = answers.p_values[:1] != [None], bool(answers.scored)
    columns += ["fits in"] * with_p + ["true"] * with_truth
    rows = []
    for i, file in enumerate(answers.files):
        row: list[Any] = [file, answers.labels[i], f"{answers.probabilities[i]:.3f}"]
        p = answers.p_values[i]
        row += ([None if p is None else f"{p:.3f}"] if with_p else []) + ([answers.truth[i]] if with_truth else [])
        rows.append(row)
    return tuple(columns), rows


def json_of(answers: Answers, settings: dict[str, Any], score: dict[str, Any] | None) -> dict[str, Any]:
    """Return answers, score and settings as JSON values."""
    predictions = [
        {"file": f, "label": answers.labels[i], "probability": answers.probabilities[i],
         "p_value": answers.p_values[i], "true": answers.truth[i]}
        for i, f in enumerate(answers.files)
    ]  # fmt: skip
    plain = {k: v for k, v in (score or {}).items() if not k.endswith("lines")} if score else None
    return {**settings, "remarks": answers.remarks, "score": plain, "predictions": predictions}


def _csv(answers: Answers) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", "label", "probability", "p_value", "true"])
    for i, file in enumerate(answers.files):
        p, t = answers.p_values[i], answers.truth[i]
        cells = ["" if p is None else f"{p:.6f}", "" if t is None else t]
        writer.writerow([file, answers.labels[i], f"{answers.probabilities[i]:.6f}", *cells])
    return buffer.getvalue()


def write_answers(
    args: argparse.Namespace, answers: Answers, settings: dict[str, Any], score: dict[str, Any] | None
) -> dict[str, Path]:
    """Write predictions.csv, predictions.json and the report; return where each is."""
    from thrifty.report import write_text

    out = Path(args.out)
    write_text(out / "predictions.csv", _csv(answers))
    text = json.dumps(json_of(answers, settings, score), indent=1, ensure_ascii=False)
    write_text(out / "predictions.json", text + "\n")
    page = _report(args, answers, settings, score).write(out)
    return {"predictions": out / "predictions.csv", "report": page}


def _report(
    args: argparse.Namespace, answers: Answers, settings: dict[str, Any], score: dict[str, Any] | None
) -> Report:
    from thrifty.report import Report, Table

    shots = settings["shots"]
    report = Report(f"classify {Path(args.support).resolve().name}", seed=args.seed, metric="accuracy")
    tally = Counter(answers.labels)
    report.headline = score["lines"][0] if score else f"{len(answers.labels)} pictures labelled"
    report.notes += [*(score["lines"][1:] if score else []), *answers.remarks]
    ends = f"{min(shots.values())}" + (f" to {max(shots.values())}" if len(set(shots.values())) > 1 else "")
    report.notes.append(
        f"{len(shots)} classes of {ends} shots, {settings['encoder']}, {args.estimator.replace('_', ' ')}"
        + (f", 'unknown' at {percent(args.unknown)}" if args.unknown else "")
    )
    report.files |= {"predictions": "predictions.csv", "the same with all settings": "predictions.json"}
    if score:
        _add_confusions(report, args, answers, score)
    columns, rows = rows_of(answers)
    report.tables.append(Table("How often each label was given", ("label", "pictures"), sorted(tally.items())))
    report.tables.append(Table("Answers", columns, rows[:1000], "The first thousand." if len(rows) > 1000 else ""))
    report.tables.append(Table("Settings", ("what", "which"), [[k, str(v)] for k, v in settings.items()]))
    return report


def _add_confusions(report: Report, args: argparse.Namespace, answers: Answers, score: dict[str, Any]) -> None:
    from thrifty.report import Gallery, Matrix, Table

    seen = {c["class"] for c in score["classes"]}
    kept = [i for i, name in enumerate(score["rows"]) if name in seen]
    rows, counts = tuple(score["rows"][i] for i in kept), [score["confusions"][i] for i in kept]
    report.charts.append(
        Matrix("Confusions", rows, score["columns"], counts, "true", "answered",
               note="Numbers are pictures; colour is the share of the row.")
    )  # fmt: skip
    wrong = [i for i in answers.scored if answers.labels[i] != answers.truth[i]]
    wrong.sort(key=lambda i: -answers.probabilities[i])
    shown = [
        (thumbnail(answers.paths[i], args.background), f"{answers.truth[i]} → {answers.labels[i]}")
        for i in wrong[:THUMBNAILS]
    ]
    if shown:
        note = f"True → answered; {len(shown)} of {len(wrong)}, the most certain first."
        report.charts.append(Gallery("Wrong answers", shown, note))
    table = [
        [c["class"], c["queries"], c["right"], percent(c["accuracy"]), c["most_taken_for"], c["times"] or None]
        for c in score["classes"]
    ]
    columns = ("class", "queries", "right", "accuracy", "most often taken for", "times")
    report.tables.append(Table("Classes", columns, table))
