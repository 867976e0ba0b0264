"""`thrifty forecast`: how well a folder of labelled pictures will do, and how many more would do better."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.cli.pictures import Features, add_encoder, counts, joined, percent, refuse_out, share
from thrifty.errors import DataError, ThriftyError

if TYPE_CHECKING:
    from thrifty.fewshot.features import FolderFeatures
    from thrifty.fewshot.generalization import Forecast, GaussianModel, Offset, ShotsNeeded
    from thrifty.fewshot.generalization.anchor import Anchor
    from thrifty.report import Report

REHEARSALS = 1000  # simulated worlds behind an interval
EPISODES = 200  # of validation classes, behind an offset
FAR = 0.15  # a difference of two forecasts that is worth a warning
ANCHORED = 5  # classes from which the forecast is tied to leave-one-out (docs/features.md says why)


def add(verbs: Any) -> None:
    """Add the verb and its flags."""
    from thrifty.cli.parser import _common, _out, _verb

    parser = _verb(
        verbs, "forecast", "predict the accuracy of a folder of labelled pictures, without a validation set",
        "FOLDER holds a sub-folder of pictures for each class, two of each at least. Says how often nearest class mean "
        "will be right on new pictures, with these and with other numbers of shots, and which classes it will confuse.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", help="a folder with a sub-folder of pictures for each class")
    parser.add_argument(
        "--shots", type=counts, default=(1, 2, 5, 10, 20), metavar="COUNTS", help="per class (1,2,5,10,20)"
    )
    parser.add_argument(
        "--goal", type=share, default=0.9, metavar="SHARE", help="say how many more shots reach it (90%%)"
    )
    parser.add_argument(
        "--model-alone", action="store_true",
        help=f"never tie the forecast to leave-one-out, as is done for {ANCHORED} classes and more",
    )  # fmt: skip
    parser.add_argument(
        "--validation", metavar="FOLDER",
        help="pictures of other classes: what the forecast gets wrong there is taken off here",
    )  # fmt: skip
    add_encoder(parser)
    _out(parser, None)
    _common(parser, "the forecast")


@dataclass
class Found:
    """The forecast of a folder."""

    have: dict[str, int]  # shots of each class
    now: Forecast  # with the shots that there are
    curve: list[Forecast]
    offsets: dict[int, Offset]  # shots -> what validation classes taught
    needed: ShotsNeeded
    anchor: Anchor | None  # what leave-one-out taught
    remarks: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Forecast, print, write."""
    from thrifty.cli.show import remark, say, table_text
    from thrifty.report import write_text

    refuse_out(args.out)
    reader = Features(args)
    support, validation, remarks = _read(args, reader)
    found = _forecast(args, support, validation, remarks)
    for words in found.remarks:
        remark(words)
    where = None
    if args.out:
        text = json.dumps(_json(found, reader), indent=1, ensure_ascii=False) + "\n"
        write_text(Path(args.out) / "forecast.json", text)
        where = _report(args, found, reader).write(args.out)
    if args.json:
        sys.stdout.write(json.dumps(_json(found, reader), indent=1, ensure_ascii=False) + "\n")
        return 0
    say(table_text(_curve_table(found)))
    for line in [*_lines(found), *([f"report: {where}"] if where else [])]:
        say(line)
    return 0


# --- reading ---------------------------------------------------------------------------------------------------


def _read(args: argparse.Namespace, reader: Features) -> tuple[FolderFeatures, FolderFeatures | None, list[str]]:
    """Return the labelled pictures of both folders, preprocessed, and remarks."""
    from thrifty.fewshot.features import find_pictures

    folder = find_pictures(args.folder)
    remarks = []
    if len(folder.classes) < 2:
        have = f"one class, '{folder.classes[0]}'" if folder.classes else "no sub-folders with pictures"
        raise DataError(f"{args.folder} has {have}; a forecast needs two: make a sub-folder for each class")
    if "" in folder.labels:
        remarks.append(f"{folder.labels.count('')} pictures at the top level have no label and are left out")
    other = None
    if args.validation:
        other = find_pictures(args.validation)
        _refuse_validation(args, folder.classes, other.classes)
    support = _prepared(reader.of_folder(folder, "support"), args.preprocess)
    rest = None if other is None else _prepared(reader.of_folder(other, "validation"), args.preprocess)
    return support, rest, remarks


def _refuse_validation(args: argparse.Namespace, classes: tuple[str, ...], other: tuple[str, ...]) -> None:
    both = sorted(set(classes) & set(other))
    if both:
        raise DataError(
            f"--validation {args.validation} has classes of {args.folder}: {joined(both)}; it must have other ones, or "
            "the forecast has seen what it foretells"
        )
    if len(other) < len(classes):
        raise DataError(
            f"--validation {args.validation} has {len(other)} classes; it needs at least {len(classes)}, as many as "
            f"{args.folder}"
        )


def _prepared(found: FolderFeatures, letters: str) -> FolderFeatures:
    from dataclasses import replace

    import numpy as np

    from thrifty.fewshot import preprocess

    part = found.part(found.labelled)
    x: Any = preprocess(part.features.astype(np.float64), letters)
    return replace(part, features=x)


# --- the forecast ----------------------------------------------------------------------------------------------


def _forecast(
    args: argparse.Namespace, support: FolderFeatures, validation: FolderFeatures | None, remarks: list[str]
) -> Found:
    import numpy as np

    names, sizes = np.unique(support.labels, return_counts=True)
    have = {str(n): int(k) for n, k in zip(names, sizes, strict=True)}
    model = _model(args, support, validation, have, remarks)
    offsets: dict[int, Offset] = {}
    wanted = sorted({*args.shots})
    if validation is not None:
        support = _equal(support, min(have.values()), args.seed, remarks)
        offsets = _offsets(args, validation, len(have), min(have.values()), wanted, model, remarks)
    return _forecasts(args, support, have, wanted, model, offsets, remarks)


def _forecasts(
    args: argparse.Namespace, support: FolderFeatures, have: dict[str, int], wanted: list[int], model: GaussianModel,
    offsets: dict[int, Offset], remarks: list[str],
) -> Found:  # fmt: skip
    from thrifty.cli.show import progress_bar
    from thrifty.fewshot import forecast, shots_needed
    from thrifty.fewshot.generalization.anchor import anchor_of_offset, anchored, anchored_shots_needed, learn_anchor

    x, y = support.features, support.labels
    least = min(have.values())
    tied = len(have) >= ANCHORED and least > 1 and not args.validation and not args.model_alone
    with progress_bar("forecast") as progress:
        now = forecast(x, y, None, model, offsets.get(least))
        anchor = learn_anchor(x, y, model) if tied else anchor_of_offset(now) if least in offsets else None
        found = []
        for i, k in enumerate(wanted):
            said = forecast(x, y, k, model, offsets.get(k))
            found.append(said if anchor is None or k in offsets else anchored(said, anchor))
            if progress is not None:
                progress(i + 1, len(wanted) + 1, f"{k} shots")
        now = anchored(now, anchor) if tied and anchor is not None else now
        if anchor is None:
            needed = shots_needed(x, y, args.goal, model)
        else:
            needed = anchored_shots_needed(x, y, args.goal, model, anchor)
    return Found(have, now, found, offsets, needed, anchor, remarks)


def _model(
    args: argparse.Namespace, support: FolderFeatures, validation: FolderFeatures | None, have: dict[str, int],
    remarks: list[str],
) -> GaussianModel:  # fmt: skip
    """Return the model; where a class has one shot, its spread comes from the other classes or from validation."""
    from thrifty.fewshot import GaussianModel
    from thrifty.fewshot.generalization import within_scale

    single = [c for c, k in have.items() if k == 1]
    if not single:
        return GaussianModel(rehearsals=REHEARSALS, seed=args.seed)
    if validation is not None:
        remarks.append(f"one picture in {joined(single)}: the spread within classes is that of the validation classes")
        sigma = within_scale(validation.features, validation.labels)
        return GaussianModel(sigma=sigma, rehearsals=REHEARSALS, seed=args.seed)
    if len(single) < len(have):
        remarks.append(
            f"one picture in {joined(single)}: the spread within it is taken to be that of the other classes"
        )
        sigma = within_scale(support.features, support.labels)
        return GaussianModel(sigma=sigma, rehearsals=REHEARSALS, seed=args.seed)
    raise DataError(
        f"every class of {args.folder} has one picture, so nothing says how much pictures of a class differ; add a "
        "second one to some class, or give --validation FOLDER with pictures of other classes"
    )


def _equal(support: FolderFeatures, shots: int, seed: int, remarks: list[str]) -> FolderFeatures:
    """Return the same number of pictures of each class: what offsets are learned for."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(support.labels == c))[:shots] for c in np.unique(support.labels)]
    kept = np.sort(np.concatenate(rows))
    if len(kept) < len(support):
        remarks.append(f"--validation is learned for equal classes: {shots} pictures of each are used, drawn at random")
    return support.part(kept)


def _offsets(
    args: argparse.Namespace, validation: FolderFeatures, ways: int, have: int, wanted: list[int],
    model: GaussianModel, remarks: list[str],
) -> dict[int, Offset]:  # fmt: skip
    import numpy as np

    from thrifty.fewshot.generalization import learn_offset

    found = {}
    without = []
    for k in sorted({*wanted, have}):
        rng = np.random.default_rng([args.seed, k])
        try:
            found[k] = learn_offset(
                validation.features, validation.labels, ways, have, rng, at=k, episodes=EPISODES, model=model
            )
        except ThriftyError:
            without.append(k)
    if without:
        remarks.append(
            f"the smallest validation class has too few pictures for {', '.join(map(str, without))} shots; "
            + ("the correction of the shots there are is used" if have in found else "no correction there")
        )
    return found


# --- what is said ----------------------------------------------------------------------------------------------


def _have(found: Found) -> str:
    low, high = min(found.have.values()), max(found.have.values())
    return f"{low}" if low == high else f"{low} to {high}"


def _curve_table(found: Found) -> Any:
    from thrifty.report import Table

    rows: list[list[Any]] = []
    points = [(str(f.shots[0]), f) for f in found.curve]
    if len({*found.now.shots}) > 1 or found.now.shots[0] not in {f.shots[0] for f in found.curve}:
        points.append((f"{_have(found)} (as now)", found.now))
    for words, f in points:
        ends = [None, None] if f.low is None or f.high is None else [percent(1 - f.high), percent(1 - f.low)]
        mark = " ← now" if words == _have(found) else ""
        row = [f"{words}{mark}", percent(f.accuracy), *ends]
        row += [percent(1 - f.raw_error)] if found.anchor or found.offsets else []
        rows.append([*row, "yes" if _corrected(found, f) else "of now"] if found.offsets else row)
    columns = ["shots per class", "accuracy", "from", "to"]
    columns += ["model alone"] if found.anchor or found.offsets else []
    columns += ["validation offset"] if found.offsets else []
    return Table("Forecast", tuple(columns), rows, f"95 % interval for this support; nearest class mean. {_how(found)}")


def _how(found: Found) -> str:
    if found.offsets:
        return "Corrected by what the model gets wrong on the validation classes."
    if found.anchor is not None:
        return "The Gaussian model, tied to leave-one-out on these pictures."
    return "The Gaussian model alone."


def _corrected(found: Found, f: Forecast) -> bool:
    return len({*f.shots}) == 1 and f.shots[0] in found.offsets


def _lines(found: Found) -> list[str]:
    now, needed = found.now, found.needed
    lines = [_headline(found)]
    if now.left_out is not None:
        lines.append(f"leave-one-out on the same pictures (a shot less): {percent(1 - now.left_out)}")
    if now.left_out is not None and found.anchor is None and abs(now.left_out - now.error) > FAR:
        lines.append("these two are far apart: the features are not as the model takes them; believe leave-one-out")
    pairs = [f"{a} → {b} {percent(p)}" for a, b, p in now.worst(5) if p >= 0.005]
    lines.append(f"most confused: {'; '.join(pairs)}" if pairs else "no two classes are confused in one case in 200")
    lines.append(_goal(needed))
    return lines


def _headline(found: Found) -> str:
    now = found.now
    ends = "" if now.low is None or now.high is None else f" ({percent(1 - now.high)} to {percent(1 - now.low)})"
    said = f"with the {_have(found)} shots there are: {percent(now.accuracy)}{ends} of new pictures right"
    return f"{said}, where classes come equally often"


def _goal(needed: ShotsNeeded) -> str:
    goal = percent(needed.accuracy, 0 if needed.accuracy * 100 == round(needed.accuracy * 100) else 1)
    if needed.shots is None:
        best = percent(needed.best_accuracy)
        return f"{goal} is out of reach with these features: {best} with endless shots; try another encoder or --crops"
    spread = [k if k is not None else "never" for k in (needed.optimistic, needed.pessimistic)]
    more = f"{needed.more} more" if needed.more else "no more"
    return f"for {goal}: {more} of each class, {needed.shots} in all (interval: {spread[0]} to {spread[1]} in all)"


def _json(found: Found, reader: Features) -> dict[str, Any]:
    return {
        "shots": found.have,
        "now": found.now.to_json(),
        "curve": [f.to_json() for f in found.curve],
        "offsets": {str(k): {"value": o.value, "half_width": o.half_width} for k, o in found.offsets.items()},
        "needed": {**found.needed.__dict__, "more": found.needed.more},
        "anchor": None if found.anchor is None else found.anchor.__dict__,
        "remarks": found.remarks,
        **reader.settings(),
    }


def _report(args: argparse.Namespace, found: Found, reader: Features) -> Report:
    from thrifty.report import Matrix, Report, Table

    settings = reader.settings()
    report = Report(f"forecast {Path(args.folder).resolve().name}", seed=args.seed, metric="accuracy")
    report.headline = _headline(found)
    report.notes += [*_lines(found)[1:], *found.remarks]
    report.notes.append(f"{len(found.have)} classes, {settings['encoder']}, nearest class mean; a forecast, not a test")
    report.charts.append(_chart(args, found))
    names = tuple(str(c) for c in found.now.classes)
    values = [[100 * float(v) for v in row] for row in found.now.confusions]
    report.charts.append(
        Matrix("Expected confusions, with the shots there are", names, names, values, "true", "answered",
               note="Per cent of the pictures of each class, before any validation offset.")
    )  # fmt: skip
    report.tables.append(_curve_table(found))
    pairs = [[str(a), str(b), percent(p)] for a, b, p in found.now.worst(10)]
    report.tables.append(Table("Most confused", ("class", "taken for", "how often"), pairs))
    report.tables.append(Table("Shots", ("class", "pictures"), sorted(found.have.items())))
    report.tables.append(Table("Settings", ("what", "which"), [[k, str(v)] for k, v in settings.items()]))
    report.files["all numbers"] = "forecast.json"
    return report


def _chart(args: argparse.Namespace, found: Found) -> Any:
    from thrifty.report import Chart, Line

    x = [float(f.shots[0]) for f in found.curve]
    y = [100 * f.accuracy for f in found.curve]
    low = [None if f.high is None else 100 * (1 - f.high) for f in found.curve]
    high = [None if f.low is None else 100 * (1 - f.low) for f in found.curve]
    lines = [Line("forecast, 95 % interval", x, y, low, high)]
    have = min(found.have.values())
    if found.now.left_out is not None and have > 1:
        lines.append(Line("leave-one-out (a shot less)", [have - 1.0], [100 * (1 - found.now.left_out)]))
    if found.anchor is not None or found.offsets:
        lines.append(Line("the Gaussian model alone", x, [100 * (1 - f.raw_error) for f in found.curve]))
    return Chart(
        "Accuracy by shots", "shots per class", "accuracy", lines, "%", log_x=True, goal=100 * args.goal,
        mark=float(have), mark_name=f"now: {_have(found)}", note=_how(found),
    )  # fmt: skip
