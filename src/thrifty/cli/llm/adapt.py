"""`thrifty llm adapt`: tune one scalar in a hundred (GaLLoP), write the adapter, merge it, take it out again."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.cli.llm.shared import (
    EXAMPLES,
    Refusals,
    add_answer,
    add_model,
    add_reading,
    answer,
    check_file,
    check_model,
    check_new,
    check_reading,
    load,
    losses_of,
    readable,
    rounded,
    size_of,
    some,
    write_folder,
)  # fmt: skip
from thrifty.errors import DataError, KnobError, close_to

if TYPE_CHECKING:
    from thrifty.llm.gallop import Adapter, Select, Selection, Tune
    from thrifty.llm.loading import Encoded, Example

SCORES = ("gallop", "saft", "snip", "fisher", "lowest", "highest", "random")  # keys of thrifty.llm.gallop.SCORES
SCOPES = ("global", "block", "tensor")
KEPT = "thrifty_adapter.safetensors"  # beside a merged checkpoint: what is in it, to take it out again
LOOKED_AT = 256  # examples whose loss is measured before and after, at most


def add(methods: Any) -> None:
    """Add the method and its flags."""
    from thrifty.cli.parser import _verb, pair

    parser = _verb(
        methods, "adapt", "tune a few scalars of a model (GaLLoP), merge them, take them out again",
        "Tunes with --data; --apply, --unmerge and --overlap work on adapters that are there.",
    )  # fmt: skip
    add_model(parser, needed=False)
    group = parser.add_argument_group("tuning")
    group.add_argument("--data", metavar="FILE", help=EXAMPLES)
    group.add_argument("--validation", metavar="FILE", help="the same, only to measure the loss before and after")
    group.add_argument("--density", type=float, default=0.01, help="share of the block weights (%(default)s)")
    group.add_argument("--score", choices=SCORES, default="gallop", help="what makes a scalar worth it (%(default)s)")
    group.add_argument("--scope", choices=SCOPES, default="global", help="where the highest are taken (%(default)s)")
    group.add_argument("--lr", type=float, default=3e-4, help="step size (%(default)s)")
    group.add_argument("--epochs", type=int, default=3, help="passes over the data (%(default)s)")
    group.add_argument("--steps", type=int, default=0, help="updates, instead of epochs")
    add_reading(group, batch=16)  # type: ignore[arg-type]
    group.add_argument("--micro-batch", type=int, default=0, metavar="N", help="examples a backward pass")
    group.add_argument(
        "--knobs", nargs="+", type=pair, default=(), metavar="KNOB=VALUE",
        help="other fields of thrifty.llm.gallop.Select and Tune",
    )  # fmt: skip
    group.add_argument("--merge", metavar="FOLDER", help="write the tuned checkpoint as well")
    group.add_argument("--resume", action="store_true", help="go on with the interrupted run that is beside OUT")
    other = parser.add_argument_group("adapters that are there")
    other.add_argument("--apply", nargs="+", metavar="ADAPTER", help="write MODEL with these in it to OUT")
    other.add_argument(
        "--unmerge", nargs="?", const="", metavar="ADAPTER",
        help="write MODEL, a folder of --apply or --merge, without it to OUT; ADAPTER: when it is not in that folder",
    )  # fmt: skip
    other.add_argument("--overlap", nargs="+", metavar="ADAPTER", help="say what two or more have in common")
    parser.add_argument(
        "--out", metavar="PATH", help="the adapter's file (adapter.safetensors); the folder with --apply and --unmerge"
    )
    add_answer(parser)


def run(args: argparse.Namespace) -> int:
    """Tune, apply, take out or compare."""
    jobs = [name for name in ("data", "apply", "unmerge", "overlap") if getattr(args, name) is not None]
    if len(jobs) != 1:
        what = "nothing to do" if not jobs else f"{', '.join(f'--{j}' for j in jobs)} are different jobs"
        raise KnobError(f"{what}; give one of --data (tune), --apply, --unmerge, --overlap")
    if jobs != ["overlap"] and args.model is None:
        raise KnobError(f"--{jobs[0]} needs --model, a checkpoint folder or a .gguf file")
    return {"data": _tune, "apply": _apply, "unmerge": _unmerge, "overlap": _overlap}[jobs[0]](args)


# --- tuning ----------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> int:
    from thrifty.budget import format_bytes, format_count
    from thrifty.cli.show import table_text
    from thrifty.report import Table

    out = Path(args.out or "adapter.safetensors")
    how, examples, validation = _settings(args, out)
    begun = time.perf_counter()
    model, tokenizer = load(args, training=True)
    data, held = _encoded(args, tokenizer, examples, validation)
    looked = {"training data": some(data, LOOKED_AT, args.seed), **({"validation": held} if held else {})}
    adapter, selection, before = _run(args, model, data, looked, how, out)
    after = {name: float(losses_of(model, of, args.batch).mean()) for name, of in looked.items()}
    readable(adapter.save(out))
    out.with_name(f"{out.name}.run").unlink(missing_ok=True)
    if args.merge:
        _write_merged(model, tokenizer, adapter, args.merge)
    found = {
        "adapter": str(out), "bytes": out.stat().st_size, "model": args.model, "merged": args.merge,
        "scalars": selection.count, "eligible": selection.eligible, "density": selection.density,
        "updates": adapter.info["steps"], "losses": {n: {"examples": len(looked[n]), "before": before[n],
                                                         "after": after[n]} for n in looked},
        "seconds": time.perf_counter() - begun, "settings": {"select": asdict(how[0]), "tune": asdict(how[1])},
    }  # fmt: skip
    rows = [(n, len(looked[n]), rounded(before[n]), rounded(after[n])) for n in looked]
    lines = [
        table_text(Table("", ("loss, nats a token", "examples", "before", "after"), rows)),
        f"tuned: {format_count(selection.count)} of {format_count(selection.eligible)} scalars "
        f"({100 * selection.density:.3g} %, {how[0].score}), {adapter.info['steps']} updates; "
        "every other one is as it was",
        f"adapter: {out} ({format_bytes(out.stat().st_size)})     {found['seconds']:.0f} s",
        *([f"merged: {args.merge}"] if args.merge else []),
    ]
    return answer(args, found, lines)


def _settings(args: argparse.Namespace, out: Path) -> tuple[tuple[Select, Tune], list[Example], list[Example]]:
    """Return the settings and the data, or refuse everything that is wrong before the model is read."""
    from thrifty.llm.gallop import Select, Tune
    from thrifty.llm.loading import read_jsonl

    refusals = Refusals()
    check_model(refusals, args.model)
    check_reading(refusals, args)
    examples = refusals.check(lambda: read_jsonl(args.data))
    validation = refusals.check(lambda: read_jsonl(args.validation)) if args.validation else []
    check_file(refusals, str(out), "--out", ".safetensors")
    check_file(refusals, args.json, "--json")
    check_new(refusals, args.merge, "--merge")
    kept = out.with_name(f"{out.name}.run")
    refusals.unless(
        args.resume or not kept.exists(),
        f"{kept} is an interrupted run; go on with --resume, or delete it, or choose another --out",
    )
    of_select = {"density": args.density, "score": args.score, "scope": args.scope, "seed": args.seed}
    of_tune = {"lr": args.lr, "epochs": args.epochs, "steps": args.steps, "batch": args.batch,
               "micro_batch": args.micro_batch, "seed": args.seed}  # fmt: skip
    names = {f.name for f in fields(Select)} - {"batch"}, {f.name for f in fields(Tune)}
    for key, value in dict(args.knobs).items():
        known = [of for of, of_names in zip((of_select, of_tune), names, strict=True) if key in of_names]
        refusals.unless(bool(known), f"--knobs {key}: {close_to(key, names[0] | names[1])}")
        for of in known:
            of[key] = value
    choose = refusals.check(lambda: _made(Select, of_select))
    train = refusals.check(lambda: _made(Tune, of_tune))
    refusals.raise_all()
    assert choose is not None
    assert train is not None
    return (choose, train), examples or [], validation or []


def _made(kind: type[Any], values: dict[str, Any]) -> Any:
    """Return a value of the settings; one of a wrong type is a refusal too."""
    try:
        return kind(**values)
    except TypeError as err:
        raise KnobError(f"{kind.__name__}: {err}") from err


def _encoded(
    args: argparse.Namespace, tokenizer: Any, examples: list[Example], validation: list[Example]
) -> tuple[list[Encoded], list[Encoded]]:
    from thrifty.llm.loading import encode

    refusals, found = Refusals(), []
    for flag, of in (("--data", examples), ("--validation", some(validation, LOOKED_AT, args.seed))):
        made = refusals.check(lambda of=of: encode(of, tokenizer, args.max_tokens, chat=args.chat)) if of else []  # type: ignore[misc]
        if made is None:
            refusals.found[-1] = f"{flag}: {refusals.found[-1]}"
        found.append(made or [])
    refusals.raise_all()
    return found[0], found[1]


def _run(
    args: argparse.Namespace, model: Any, data: list[Encoded], looked: dict[str, list[Encoded]],
    how: tuple[Select, Tune], out: Path,
) -> tuple[Adapter, Selection, dict[str, float]]:  # fmt: skip
    """Select and tune, or go on; return the adapter, what was selected, and the losses before."""
    from thrifty.cli.show import progress_bar, remark
    from thrifty.llm.gallop import Checkpoint, fingerprint, select, tune

    settings = {"select": asdict(how[0]), "tune": asdict(how[1])}
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(out.with_name(f"{out.name}.run"), {**settings, **fingerprint(model, data)})
    before = {name: float(losses_of(model, of, args.batch).mean()) for name, of in looked.items()}
    selection = checkpoint.selection() if args.resume else None
    if selection is None:
        with progress_bar("selecting") as bar:
            show = None if bar is None else (lambda done, total: bar(done, total, "examples"))
            selection = select(model, data, how[0], show)
        checkpoint.write(selection)
    try:
        with progress_bar("tuning") as bar:
            step = None if bar is None else (lambda s: bar(s.number, s.of, f"loss {s.loss:.4f}"))
            return tune(model, data, selection, how[1], step, Path(args.model).name, checkpoint), selection, before
    except KeyboardInterrupt:
        remark(f"what was tuned is kept in {checkpoint.path}: run the same command with --resume")
        raise
    except DataError:
        checkpoint.path.unlink(missing_ok=True)  # diverged: going on would not help
        raise


# --- adapters that are there -----------------------------------------------------------------------------------


def _apply(args: argparse.Namespace) -> int:
    from thrifty.budget import format_bytes, format_count
    from thrifty.cli.show import table_text
    from thrifty.llm.gallop import combine

    refusals = Refusals()
    check_model(refusals, args.model)
    adapters = _read(args.apply, refusals)
    out = _new_folder(args, refusals)
    combined = combine(adapters)
    model, tokenizer = load(args, args.dtype or _dtype(adapters))
    combined.merge(model)
    _write_merged(model, tokenizer, combined, out)
    table, pairs = _pairs(args.apply, adapters)
    found = {"merged": str(out), "bytes": size_of(out), "scalars": combined.count, "model": args.model,
             "adapters": args.apply, "overlap": pairs}  # fmt: skip
    lines = [table_text(table)] if pairs else []
    lines.append(f"merged: {format_count(combined.count)} scalars into {out} ({format_bytes(size_of(out))})")
    return answer(args, found, lines)


def _unmerge(args: argparse.Namespace) -> int:
    from thrifty.budget import format_count
    from thrifty.llm.gallop import Adapter

    path = Path(args.unmerge) if args.unmerge else Path(args.model) / KEPT
    refusals = Refusals()
    check_model(refusals, args.model)
    if not args.unmerge and not path.is_file():
        refusals.found.append(f"{args.model} holds no {KEPT}; name the adapter that is merged: --unmerge ADAPTER")
        adapter: Adapter | None = None
    else:
        adapter = refusals.check(lambda: Adapter.load(path))
    out = _new_folder(args, refusals)
    assert adapter is not None
    model, tokenizer = load(args, args.dtype or _dtype([adapter]))
    adapter.unmerge(model)
    _save(model, tokenizer, out)
    found = {"base": str(out), "bytes": size_of(out), "scalars": adapter.count, "model": args.model}
    return answer(args, found, [f"base: {out}; {format_count(adapter.count)} scalars are what they were, bit for bit"])


def _overlap(args: argparse.Namespace) -> int:
    from thrifty.cli.show import table_text

    refusals = Refusals()
    refusals.unless(len(args.overlap) > 1, "--overlap compares two adapters or more")
    adapters = _read(args.overlap, refusals)
    refusals.raise_all()
    table, pairs = _pairs(args.overlap, adapters)
    return answer(args, {"overlap": pairs}, [table_text(table), table.note])


def _read(paths: list[str], refusals: Refusals) -> list[Adapter]:
    from thrifty.llm.gallop import Adapter

    found = [refusals.check(lambda p=p: Adapter.load(p)) for p in paths]  # type: ignore[misc]
    return [a for a in found if a is not None]


def _new_folder(args: argparse.Namespace, refusals: Refusals) -> Path:
    """Return the folder to write, and raise all refusals."""
    refusals.unless(args.out is not None, "--out FOLDER says where the checkpoint goes")
    check_new(refusals, args.out, "--out")
    refusals.raise_all()
    return Path(args.out)


def _dtype(adapters: list[Adapter]) -> str | None:
    """Return the dtype of the base that adapters were trained from."""
    kinds = {str(e.base.dtype).removeprefix("torch.") for a in adapters for e in a.entries.values()}
    return kinds.pop() if len(kinds) == 1 else None


def _pairs(names: list[str], adapters: list[Adapter]) -> tuple[Any, list[dict[str, Any]]]:
    from thrifty.llm.gallop import overlap
    from thrifty.report import Table

    found, rows = [], []
    for (a, of_a), (b, of_b) in combinations(zip(names, adapters, strict=True), 2):
        both = overlap(of_a, of_b)
        found.append({"a": a, "b": b, **both})
        rows.append((a, b, both["common"], f"{100 * both['share']:.2f} %", f"{100 * both['expected_share']:.2f} %",
                     rounded(both["jaccard"])))  # fmt: skip
    note = "share: of the smaller one; by chance: of two random choices of these sizes in each tensor"
    columns = ("adapter", "and", "common", "share", "by chance", "Jaccard")
    return Table("", columns, rows, note), found


def _write_merged(model: Any, tokenizer: Any, adapter: Adapter, folder: str | Path) -> None:
    """Write a checkpoint with the tuned scalars in it, and the adapter beside it."""
    _save(model, tokenizer, folder, lambda place: adapter.save(place / KEPT))


def _save(model: Any, tokenizer: Any, folder: str | Path, more: Any = None) -> None:
    def write(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if more is not None:
            more(place)

    write_folder(folder, write)
