"""`thrifty groups MODEL --data clips/`: which layers of a transformer are alike, as a table and a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LINKAGES = ("average", "complete", "single")
METHODS = ("exact", "minibatch")


def add(verbs: Any) -> None:
    """Add the verb and its flags."""
    from thrifty.cli.parser import _verb

    parser = _verb(
        verbs, "groups", "find the groups of similar layers of a transformer",
        "Measures linear CKA between the layers on clips or texts, cuts their tree, writes OUT/groups.html and .json.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="a folder of a Hugging Face model (WavLM, HuBERT, wav2vec 2.0, "
                        "Whisper, BERT-like, Llama-like)")  # fmt: skip
    parser.add_argument("--data", required=True, metavar="DATA",
                        help="a folder of .wav or .flac clips, or a .txt or .jsonl file of texts")  # fmt: skip
    parser.add_argument("--count", type=int, metavar="K", help="how many groups (4)")
    parser.add_argument("--distance", type=float, metavar="D", help="instead of a count: merge up to this 1 - CKA")
    parser.add_argument("--linkage", choices=LINKAGES, default="average", help="distance of two groups (%(default)s)")
    parser.add_argument("--contiguous", action="store_true", help="merge neighbouring layers only")
    parser.add_argument("--method", choices=METHODS, default="exact", help="minibatch needs less memory (%(default)s)")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="clips or texts at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="longer clips are cut (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="clips or texts at a time (%(default)s)")
    parser.add_argument("--out", default="groups", metavar="FOLDER", help="where the page goes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the groups as JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    """Measure, cut, write the page and print the table; exit code 0."""
    from thrifty.cli.show import progress_bar, say, table_text
    from thrifty.compress import layer_groups as lg
    from thrifty.compress.layer_groups import pictures
    from thrifty.report import write_text

    model, batches = _read(args)
    with progress_bar("groups") as progress:
        cut = (args.count, args.distance, args.linkage, args.contiguous)
        groups = lg.group(model, batches, *cut, args.method, progress)
    out = Path(args.out)
    title = f"Layer groups of {Path(args.model).resolve().name}"
    found = {
        "model": type(model).__name__,
        "groups": groups.groups,
        "cka": groups.similarity.round(6).tolist(),
        "merges": [[m.left, m.right, round(m.height, 6), m.size] for m in groups.merges],
        "linkage": groups.linkage,
        "contiguous": groups.contiguous,
        "method": args.method,
        "frames": groups.frames,
    }
    text = json.dumps(found, indent=1) + "\n"
    write_text(out / "groups.json", text)
    write_text(out / "groups.html", pictures.page(groups, title))
    if args.json:
        say(text.rstrip())
        return 0
    table = pictures.groups_table(groups)
    say(table_text(table))
    say(f"{table.note}     page: {out / 'groups.html'}")
    return 0


def _read(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """Return the model, a Whisper shortened to the longest clip, and its batches."""
    from thrifty.compress import layer_groups as lg
    from thrifty.compress.layer_groups import inputs
    from thrifty.compress.layer_groups.families import FRAMES
    from thrifty.errors import KnobError

    inputs.refuse_options(args.limit, args.seconds, args.batch)
    if args.count is not None and args.distance is not None:
        raise KnobError("give --count or --distance, not both")
    model = lg.load(args.model).float()
    stack = lg.stack_of(model)
    if stack.family.mask != FRAMES:
        return model, inputs.read_batches(stack, args.data, args.model, args.limit, args.seconds, args.batch)
    clips = inputs.read_clips(args.data, args.limit, args.seconds)
    positions = min(inputs.positions_of(clips), int(stack.config.max_source_positions))
    model = lg.short_whisper(model, positions)
    return model, inputs.whisper_batches(lg.stack_of(model), clips, args.batch)
