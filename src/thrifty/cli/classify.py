"""`thrifty classify`: from a folder of labelled pictures to labels for other pictures, in one command."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.cli.classify_answers import UNKNOWN, Answers, json_of, rows_of, score_of, write_answers
from thrifty.cli.pictures import Features, add_encoder, joined, refuse_out, share
from thrifty.errors import DataError, KnobError

if TYPE_CHECKING:
    from thrifty.fewshot.features import FolderFeatures, PictureFiles, PictureFolder

ESTIMATORS = ("nearest_class_mean", "soft_kmeans", "logistic_probe")
SHOWN = 40  # predictions printed at most


def add(verbs: Any) -> None:
    """Add the verb and its flags."""
    from thrifty.cli.parser import _common, _out, _verb

    parser = _verb(
        verbs, "classify", "label pictures by a folder of labelled ones",
        "SUPPORT holds a sub-folder of pictures for each class. Queries are files or folders; where their folder has "
        "sub-folders named after classes, the answers are scored too. Without QUERY, the pictures at the top level of "
        "SUPPORT are labelled.",
    )  # fmt: skip
    parser.add_argument("support", metavar="SUPPORT", help="a folder with a sub-folder of pictures for each class")
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="pictures, or folders of pictures")
    parser.add_argument(
        "--holdout", type=int, metavar="SHOTS",
        help="instead of QUERY: learn from so many pictures of each class of SUPPORT, label the rest",
    )  # fmt: skip
    parser.add_argument(
        "--estimator", choices=ESTIMATORS, default=ESTIMATORS[0], help="how labels are decided (%(default)s)"
    )
    parser.add_argument(
        "--unknown", nargs="?", type=share, const=0.05, metavar="RATE",
        help="answer 'unknown' for what is like no class; RATE: share of known pictures that this may cost (5%%)",
    )  # fmt: skip
    add_encoder(parser)
    _out(parser, None)
    _common(parser, "the answers")


def run(args: argparse.Namespace) -> int:
    """Label, print, write."""
    from thrifty.cli.show import remark, say, table_text
    from thrifty.report import Table

    refuse_out(args.out)
    answers, settings = _answers(args)
    score = score_of(answers, args.unknown)
    for words in answers.remarks:
        remark(words)
    files = write_answers(args, answers, settings, score) if args.out else {}
    if args.json:
        sys.stdout.write(json.dumps(json_of(answers, settings, score), indent=1, ensure_ascii=False) + "\n")
        return 0
    columns, rows = rows_of(answers)
    say(table_text(Table("", columns, rows[:SHOWN])))
    if len(rows) > SHOWN:
        say(f"and {len(rows) - SHOWN} more" + ("" if args.out else "; --out FOLDER writes all of them"))
    for words in [*(score or {}).get("lines", []), *(f"{what}: {where}" for what, where in files.items())]:
        say(words)
    return 0


# --- labels ----------------------------------------------------------------------------------------------------


def _answers(args: argparse.Namespace) -> tuple[Answers, dict[str, Any]]:
    from thrifty.fewshot.features import find_pictures

    folder = find_pictures(args.support)
    _refuse_classes(folder.counts, args)
    queries = _query_files(args, folder)  # before the encoder is loaded: refusals first
    reader = Features(args)
    support = reader.of_folder(folder, "support")
    labelled = support.part(support.labelled)
    remarks = [f"{len(folder.ignored)} files are no pictures: {joined(folder.ignored, 3)}"] if folder.ignored else []
    if args.holdout is not None:
        shots, rest = _split(labelled.labels, args.holdout, args.seed)
        train, x = labelled.part(shots), labelled.features[rest]
        files = [labelled.files[i] for i in rest]
        paths = [folder.root / f for f in files]
        truth: list[str | None] = [str(labelled.labels[i]) for i in rest]
    else:
        from thrifty.fewshot.features import PictureFiles

        files, paths, named = [q[0] for q in queries], [q[1] for q in queries], [q[2] for q in queries]
        pictures = PictureFiles(tuple(paths), args.background)
        train, x = labelled, reader.of_files(pictures, "queries")
        same = _also_shots(folder, pictures)
        remarks += _strangers(named, train.classes, args.unknown) + _leaks([files[i] for i in same])
        known: list[str | None] = [t if t is None or t in train.classes else UNKNOWN for t in named]
        truth = [None if i in same else t for i, t in enumerate(known)]
    model = _model(args, train).fit(train.features, train.labels)
    labels = [str(v) for v in model.predict(x)]
    best = [float(v) for v in model.predict_proba(x).max(axis=1)]
    p_values: list[float | None] = [None] * len(files)
    if args.unknown:
        p_values = [float(v) for v in model.p_values(x)]
    counts = Counter(train.labels.tolist())
    settings = {
        "support": str(args.support), "shots": {c: counts[c] for c in train.classes}, "estimator": args.estimator,
        "unknown_rate": args.unknown, **reader.settings(),
    }  # fmt: skip
    return Answers(files, labels, best, p_values, truth, train.classes, paths, remarks), settings


def _model(args: argparse.Namespace, train: FolderFeatures) -> Any:
    """Return the classifier of the flags; nearest class mean with probabilities from shots left out."""
    import numpy as np

    from thrifty.fewshot import ESTIMATORS as KNOWN
    from thrifty.fewshot import WithUnknown, preprocess
    from thrifty.fewshot.calibration import left_out_variance

    knobs: dict[str, Any] = {"preprocess": args.preprocess}
    if args.estimator == "nearest_class_mean":
        prepared = preprocess(train.features.astype(np.float64), args.preprocess)
        knobs["variance"] = left_out_variance(prepared, train.labels)
    inner: Any = KNOWN[args.estimator](**knobs)
    return WithUnknown(inner, args.unknown, preprocess=args.preprocess) if args.unknown else inner


def _refuse_classes(found: dict[str, int], args: argparse.Namespace) -> None:
    """Refuse a support that cannot decide anything, saying what to do."""
    if not found:
        raise DataError(f"{args.support} has no sub-folders with pictures; make one for each class, named after it")
    if UNKNOWN in found and args.unknown:
        raise DataError(f"{args.support}/{UNKNOWN} is a class called '{UNKNOWN}', which --unknown answers; rename it")
    if len(found) == 1 and not (args.unknown and args.estimator == "nearest_class_mean"):
        raise DataError(
            f"{args.support} has one class, '{next(iter(found))}'; add a sub-folder for another, or use --unknown with "
            "nearest_class_mean to tell it from the rest of the world"
        )
    if args.holdout is None:
        return
    if args.queries:
        raise KnobError("--holdout labels the rest of SUPPORT; leave QUERY out")
    if args.holdout < 1:
        raise KnobError(f"--holdout is {args.holdout}; it must be at least 1")
    small = [f"{c} ({n})" for c, n in found.items() if n <= args.holdout]
    if small:
        raise DataError(
            f"--holdout {args.holdout} leaves nothing to label in {', '.join(small)}; take fewer shots, or add pictures"
        )


def _query_files(args: argparse.Namespace, folder: Any) -> list[tuple[str, Path, str | None]]:
    """Return (shown name, path, label of its sub-folder or None) of each query."""
    from thrifty.fewshot.features import find_pictures

    if args.holdout is not None:
        return []
    if not args.queries:
        top = [f for f, label in zip(folder.files, folder.labels, strict=True) if not label]
        if not top:
            raise KnobError(
                "nothing to label: give QUERY (pictures or folders), put pictures at the top level of "
                f"{args.support}, or give --holdout SHOTS to label a part of it"
            )
        return [(f.as_posix(), folder.root / f, None) for f in top]
    found: list[tuple[str, Path, str | None]] = []
    missing = [q for q in args.queries if not Path(q).exists()]
    if missing:
        raise DataError(f"no such file or folder: {joined(missing)}")
    for query in map(Path, args.queries):
        if not query.is_dir():
            found.append((str(query), query, None))
            continue
        inside = find_pictures(query)
        rows = zip(inside.files, inside.labels, strict=True)
        found += [((query / f).as_posix(), query / f, label or None) for f, label in rows]
    return found


def _split(labels: Any, shots: int, seed: int) -> tuple[Any, Any]:
    """Return the rows of `shots` pictures of each class, drawn at random, and the rest."""
    import numpy as np

    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    chosen = np.sort(np.concatenate([rows[:shots] for rows in order]))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def _strangers(named: list[str | None], classes: tuple[str, ...], unknown: float | None) -> list[str]:
    strange = sorted({t for t in named if t is not None} - set(classes))
    if not strange:
        return []
    what = "right when 'unknown'" if unknown else "never right; --unknown lets them be refused"
    return [f"query sub-folders of no class of the support: {joined(strange)}; they are {what}"]


def _also_shots(folder: PictureFolder, queries: PictureFiles) -> list[int]:
    """Return which queries are, byte for byte, also in the support."""
    shots = replace(folder, files=tuple(f for f, c in zip(folder.files, folder.labels, strict=True) if c)).pictures()
    known = {replace(shots, background=queries.background).key(i) for i in range(len(shots))}
    return [i for i in range(len(queries)) if queries.key(i) in known]


def _leaks(same: list[str]) -> list[str]:
    if not same:
        return []
    return [f"{len(same)} queries are also in the support, byte for byte, and left out of the score: {joined(same, 3)}"]
