"""`thrifty llm loop`: run a block range of a model again: does it help, which range, what does it write."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, replace
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
    check_reading,
    load,
    pad_of,
    read_prompt,
    waiting,
)  # fmt: skip
from thrifty.errors import KnobError, ThriftyError

if TYPE_CHECKING:
    from thrifty.llm.inner_loop import Cell, Plan, Scan

MODES = ("uniform", "naive", "reference", "alignment", "damped", "noise")
GRANULARITIES = ("block", "boundary")
KV_MODES = ("own", "first_pass")
PLAN_FILE = "inner_loop.json"
SHOWN = 10  # ranges of a scan
REUSED = 2 << 30  # bytes of states that a scan may keep
SCORES = {True: "accuracy", False: "log-likelihood, nats a token"}


def add(methods: Any) -> None:
    """Add the method and its flags."""
    from thrifty.cli.parser import _verb

    parser = _verb(
        methods, "loop", "run a block range of a frozen model again, and measure what that does",
        "With --data the plan is compared with the model itself and with a noise control, example by example.",
    )  # fmt: skip
    add_model(parser)
    group = parser.add_argument_group("plan")
    group.add_argument("--plan", metavar="START:END:PASSES",
                       help="blocks START to END-1 run PASSES times; or a JSON file")  # fmt: skip
    group.add_argument("--mode", choices=MODES, help="how a pass is mixed with those before it (uniform)")
    group.add_argument("--granularity", choices=GRANULARITIES, help="mix every block's output, or the range's (block)")
    group.add_argument("--kv", choices=KV_MODES, help="keys and values of each pass, or of the first (own)")
    group.add_argument("--save-plan", nargs="?", const="", metavar="FILE",
                       help=f"write the plan as JSON; without FILE, as {PLAN_FILE} beside the model")  # fmt: skip
    data = parser.add_argument_group("effect")
    data.add_argument("--data", metavar="FILE", help=f"{EXAMPLES}, or with prompt, choices and answer")
    data.add_argument("--limit", type=int, default=200, metavar="N", help="examples at most (%(default)s)")
    add_reading(data, batch=8)  # type: ignore[arg-type]
    scan = parser.add_argument_group("scan")
    scan.add_argument("--scan", action="store_true", help="instead of a plan: try every range on --data")
    scan.add_argument("--passes", type=_numbers, default=(2,), metavar="COUNTS", help="that are tried, such as 2,3 (2)")
    scan.add_argument("--longest", type=int, default=4, metavar="N", help="blocks of a range at most (%(default)s)")
    scan.add_argument("--blocks", type=_span, metavar="START:END", help="ranges inside these blocks only")
    scan.add_argument("--map", metavar="FILE", help="write the heat map: .html, or .svg for one number of passes")
    scan.add_argument("--state", metavar="FILE", help="keep what is done; the same command goes on from it")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", metavar="TEXT", help="go on with a text, without and with the loop")
    text.add_argument("--tokens", type=int, default=48, metavar="N", help="that are generated (%(default)s)")
    add_answer(parser)


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text) or min(found := sorted({int(n) for n in text.split(",")})) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of passes such as 2,3; 1 is the model itself")
    return tuple(found)


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a range such as 8:20 (END lies behind the last block)")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    """Measure, scan, generate, write the plan; exit code 0."""
    plan = _checked(args)
    model, tokenizer = load(args)
    parts = _parts(model)
    if args.blocks and args.blocks[1] > len(parts.blocks):
        raise KnobError(f"--blocks {args.blocks[0]}:{args.blocks[1]}; the model has blocks 0..{len(parts.blocks) - 1}")
    found: dict[str, Any] = {"model": args.model, "blocks": len(parts.blocks)}
    lines: list[str] = []
    if plan is not None:
        plan.refuse_beyond(len(parts.blocks))
        found["plan"], extra = asdict(plan), plan.extra_share(len(parts.blocks))
        lines.append(_words(plan, parts))
        found["extra_share"] = extra
    if args.data:
        rows, score, kind = _examples(args, tokenizer, pad_of(model), model)
        add_on = _scan(args, model, rows, score, kind) if args.scan else _effect(args, plan, model, rows, score, kind)
        found |= add_on[0]
        lines += add_on[1]
    if args.prompt is not None:
        add_on = _generate(args, plan, model, tokenizer)
        found |= add_on[0]
        lines += add_on[1]
    if args.save_plan is not None and plan is not None:
        where = _save(args, plan)
        found["plan_file"] = str(where)
        lines.append(f"plan: {where}")
    return answer(args, found, lines)


def _checked(args: argparse.Namespace) -> Plan | None:
    """Return the plan, or refuse everything that is wrong before the model is read."""
    from thrifty.llm.changes import parse_plan
    from thrifty.llm.loading import read_jsonl
    from thrifty.llm.questions import has_questions, read_questions

    refusals = Refusals()
    check_model(refusals, args.model)
    check_reading(refusals, args)
    knobs = {"mode": args.mode, "granularity": args.granularity, "kv_mode": args.kv, "seed": args.seed or None}
    knobs = {key: value for key, value in knobs.items() if value is not None}
    beside = _beside(args)
    plan = None
    if args.scan:
        refusals.unless(args.plan is None, "--scan tries every range; leave --plan out")
        refusals.unless(args.data is not None, "--scan needs --data, the examples on which ranges are tried")
        refusals.unless(args.save_plan is None and args.prompt is None,
                        "--scan goes without --save-plan and --prompt; give them with a --plan")  # fmt: skip
        refusals.unless(args.longest >= 1, f"--longest is {args.longest}; it must be at least 1")
        check_file(refusals, args.map, "--map", ".svg", ".html")
        check_file(refusals, args.state, "--state")
        one = len(args.passes) == 1 or not args.map or not args.map.endswith(".svg")
        refusals.unless(one, "--map: several numbers of passes need .html")
    elif args.plan is None and not beside.is_file():
        refusals.found.append(f"there is no plan: give --plan START:END:PASSES or --scan (no {beside} either)")
    else:
        plan = refusals.check(lambda: parse_plan(args.plan or str(beside), **knobs))
    if args.data:
        reader: Any = read_questions if has_questions(args.data) else read_jsonl
        refusals.check(lambda: reader(args.data))
    refusals.unless(args.limit >= 1, f"--limit is {args.limit}; it must be at least 1")
    refusals.unless(args.tokens >= 1, f"--tokens is {args.tokens}; it must be at least 1")
    refusals.unless(args.prompt is None or bool(args.prompt.strip()), "--prompt is empty; give some text")
    check_file(refusals, args.save_plan or None, "--save-plan", ".json")
    check_file(refusals, args.json, "--json")
    refusals.raise_all()
    return plan


def _beside(args: argparse.Namespace) -> Path:
    path = Path(args.model)
    return (path if path.is_dir() else path.parent) / PLAN_FILE


def _parts(model: Any) -> Any:
    from thrifty.llm.families import parts_of

    return parts_of(model)


def _words(plan: Plan, parts: Any) -> str:
    """Return what a plan does and costs."""
    from thrifty.budget import format_bytes

    blocks = len(parts.blocks)
    base = parts.kv_bytes_per_token()
    kept = blocks if plan.kv_mode == "first_pass" else len(plan.order(blocks))
    return (
        f"plan: blocks {plan.start} to {plan.end - 1} run {plan.passes} times ({plan.mode}, per "
        f"{plan.granularity}); {100 * plan.extra_share(blocks):+.0f} % blocks, "
        f"cache {format_bytes(base * kept // blocks)} a token (model: {format_bytes(base)})"
    )


# --- effect ----------------------------------------------------------------------------------------------------


def _examples(args: argparse.Namespace, tokenizer: Any, pad: int, model: Any) -> tuple[list[Any], Any, bool]:
    """Return (batches, the score of a batch, whether they are questions)."""
    from thrifty.llm.inner_loop import likelihood
    from thrifty.llm.loading import batches, encode, read_jsonl
    from thrifty.llm.questions import accuracy, has_questions, question_batches, read_questions

    if has_questions(args.data):
        asked = read_questions(args.data)[: args.limit]
        size = max(1, args.batch // 4)
        rows = question_batches(asked, tokenizer, args.max_tokens, size, pad, args.chat)
        return [b.to(model.device) for b in rows], accuracy, True
    data = encode(read_jsonl(args.data)[: args.limit], tokenizer, args.max_tokens, end=False, chat=args.chat)
    return [b.to(model.device) for b in batches(data, args.batch, pad)], likelihood, False


def _effect(
    args: argparse.Namespace, plan: Plan | None, model: Any, rows: list[Any], score: Any, questions: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return what the plan does to the score, against the model and against the noise control."""
    from thrifty.cli.show import progress_bar, table_text
    from thrifty.llm.inner_loop import bootstrap, scan
    from thrifty.report import Table

    assert plan is not None
    plans = [plan] if plan.mode == "noise" else [plan, replace(plan, mode="noise")]
    with progress_bar("measuring") as bar:
        found = scan(model, rows, plans, score=score, stop=None, seed=args.seed, progress=bar)
    base = float(found.base.mean())
    of: list[tuple[str, float | None, float | None, float | None, float | None]]
    of = [("the model itself", base, None, None, None)]
    of += [(f"looped, {c.plan.mode}", base + c.mean, c.mean, c.low, c.high) for c in found.cells]
    lines = [f"{len(found.base)} examples, {SCORES[questions]}"]
    gain: dict[str, Any] = {}
    if len(found.cells) == 2:
        paired = found.cells[0].differences - found.cells[1].differences
        low, high = bootstrap(paired, args.seed)
        gain = {"mean": float(paired.mean()), "low": low, "high": high}
        of.append(("looped against noise", None, gain["mean"], low, high))
    cells = [(n, _shown(v), _signed(d), _interval(lo, hi)) for n, v, d, lo, hi in of]
    lines.append(table_text(Table("", ("", "score", "difference", "95 % interval"), cells)))
    lines.append(_verdict(found.cells[0], gain))
    rows_of = [{"mode": c.plan.mode, "difference": c.mean, "low": c.low, "high": c.high} for c in found.cells]
    return {"score": SCORES[questions], "examples": len(found.base), "base": base, "plans": rows_of,
            "against_noise": gain or None}, lines  # fmt: skip


def _verdict(cell: Cell, gain: dict[str, Any]) -> str:
    if cell.high < 0:
        return "the loop harms: its interval lies below the model"
    if cell.low <= 0:
        return "no difference to the model can be shown on these examples"
    if gain and gain["low"] <= 0:
        return "better than the model, but not shown to be better than the noise control"
    return "better than the model and than the noise control on these examples; confirm it on others"


def _shown(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.4f}"


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


# --- scan ------------------------------------------------------------------------------------------------------


def _scan(
    args: argparse.Namespace, model: Any, rows: list[Any], score: Any, questions: bool
) -> tuple[dict[str, Any], list[str]]:
    from thrifty.cli.show import progress_bar, remark, table_text
    from thrifty.llm.inner_loop import ranges, scan
    from thrifty.report import Table

    blocks = len(_parts(model).blocks)
    first, end = args.blocks or (0, blocks)
    knobs: dict[str, Any] = {"mode": args.mode or "uniform", "granularity": args.granularity or "block",
                             "kv_mode": args.kv or "own", "seed": args.seed}  # fmt: skip
    plans = [
        p for n in args.passes for p in ranges(blocks, args.longest, n, **knobs) if p.start >= first and p.end <= end
    ]
    try:
        with progress_bar("scanning") as bar:
            found = scan(model, rows, plans, score=score, seed=args.seed, reuse=_small(model, rows, blocks),
                         state=args.state, progress=bar)  # fmt: skip
    except KeyboardInterrupt:
        if args.state:
            remark(f"what was tried is kept in {args.state}: run the same command again")
        raise
    best = sorted(found.cells, key=lambda c: -c.mean)
    cells = [(f"{c.plan.start}:{c.plan.end}:{c.plan.passes}", _signed(c.mean), _interval(c.low, c.high),
              f"{100 * c.plan.extra_share(blocks):+.0f} %", len(c.differences)) for c in best[:SHOWN]]  # fmt: skip
    stopped = sum(c.stopped for c in found.cells)
    lines = [
        f"{len(plans)} plans on {len(found.base)} examples, {SCORES[questions]}; the model itself: "
        f"{float(found.base.mean()):.4f}" + (f"; {stopped} stopped early, they harm" if stopped else ""),
        table_text(Table("", ("plan", "difference", "95 % interval", "blocks", "examples"), cells)),
        "chosen on these examples: judge a plan on others, against noise (--plan ... --data OTHER)",
    ]
    if args.map:
        _write_map(args.map, found, args.passes)
        lines.append(f"map: {args.map}")
    return {"score": SCORES[questions], "scan": found.to_json()}, lines


def _small(model: Any, rows: list[Any], blocks: int) -> bool:
    """Whether the states of all examples behind every block may be kept, which halves a scan's work."""
    embedding = _parts(model).embedding.weight
    numbers = (blocks + 1) * sum(b.ids.numel() for b in rows) * embedding.shape[1]
    return bool(numbers * embedding.element_size() <= REUSED)


def _write_map(path: str, found: Scan, passes: tuple[int, ...]) -> None:
    from thrifty.report import write_text

    maps = {n: replace(found, cells=tuple(c for c in found.cells if c.plan.passes == n)).to_svg() for n in passes}
    if path.endswith(".svg"):
        write_text(path, next(iter(maps.values())))
        return
    body = "".join(f"<h2>{n} passes</h2>{svg}" for n, svg in maps.items())
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Scan of block ranges</title>'
    style = "<style>body{font:14px/1.4 system-ui,sans-serif;margin:2em}svg{max-width:100%}</style>"
    write_text(path, f"{head}{style}<h1>Scan of block ranges</h1>{body}</html>\n")


# --- text and plan ---------------------------------------------------------------------------------------------


def _generate(
    args: argparse.Namespace, plan: Plan | None, model: Any, tokenizer: Any
) -> tuple[dict[str, Any], list[str]]:
    """Return greedy continuations of the prompt, by the model and by the looped model."""
    from thrifty.llm.inner_loop import loop

    assert plan is not None
    ids = read_prompt(tokenizer, args.prompt, args.chat).to(model.device)
    with waiting("generating"):
        base = _continue(model, tokenizer, ids, args.tokens)
        with loop(model, plan):
            looped = _continue(model, tokenizer, ids, args.tokens)
    lines = ["", f"the model itself: {base}", "", f"looped:           {looped}"]
    return {"prompt": args.prompt, "text": base, "looped_text": looped}, lines


def _continue(model: Any, tokenizer: Any, ids: Any, tokens: int) -> str:
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=pad
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _save(args: argparse.Namespace, plan: Plan) -> Path:
    from thrifty.report import write_text

    where = Path(args.save_plan) if args.save_plan else _beside(args)
    try:
        return write_text(where, plan.to_json())
    except ThriftyError as err:
        raise KnobError(f"{err}; name another file: --save-plan FILE.json") from err
