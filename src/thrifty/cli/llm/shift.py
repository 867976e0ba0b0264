"""`thrifty llm shift`: at which depth hidden states turn from the token that came in to the next one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.cli.llm.shared import (
    Refusals,
    add_answer,
    add_model,
    add_reading,
    answer,
    check_file,
    check_model,
    check_reading,
    load,
    losses_of,
    pad_of,
    read_prompt,
    waiting,
)  # fmt: skip
from thrifty.errors import DataError

if TYPE_CHECKING:
    from thrifty.llm.causal_shift import Curves, Transition
    from thrifty.llm.loading import Encoded

PLACEMENTS = ("attn", "mlp", "block")
COLUMNS = {
    "input_match": "= token", "output_match": "= next", "self_match": "= prediction", "cosine_in": "cos token",
    "cosine_out": "cos next", "norm": "norm", "entropy": "entropy",
}  # fmt: skip
KINDS = {"match": "what the lens says", "cosine": "cosine", "centred": "cosine, mean taken off"}
TRACED = 40  # tokens of a trace without a prompt


def add(methods: Any) -> None:
    """Add the method and its flags."""
    from thrifty.cli.parser import _verb

    parser = _verb(
        methods, "shift", "show at which depth a model turns from the token that came in to the next one",
        "Depth 0 is what enters block 0. The lens is the model's own norm and head on the state of each depth.",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="plain text (.txt), or a JSONL file of examples")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="sequences at most (%(default)s)")
    add_reading(parser, batch=4)
    parser.add_argument("--skip", type=int, default=4, metavar="N",
                        help="positions left out at the beginning: their states are huge (%(default)s)")  # fmt: skip
    parser.add_argument("--csv", metavar="FILE", help="write all curves as CSV")
    parser.add_argument("--trace", metavar="FILE", help="an HTML page: what each position decodes to, by depth")
    parser.add_argument("--prompt", metavar="TEXT", help=f"of the trace (the first {TRACED} tokens of the text)")
    parser.add_argument("--attenuate", nargs="+", default=(), metavar="BLOCK:ALPHA",
                        help="weaken the residual path there and measure again: an ablation")  # fmt: skip
    parser.add_argument("--placement", choices=PLACEMENTS, default="attn", help="of the attenuation (%(default)s)")
    add_answer(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the curves, print them, write what is asked for; exit code 0."""
    from thrifty.cli.show import table_text
    from thrifty.llm.causal_shift import attenuate, curves
    from thrifty.llm.loading import batches
    from thrifty.report import Table, write_text

    alphas = _checked(args)
    model, tokenizer = load(args)
    data = _sequences(args, tokenizer)
    rows = [b.to(model.device) for b in batches(data, args.batch, pad_of(model))]
    with waiting(f"reading {len(data)} sequences at every depth"):
        found = curves(model, rows, args.skip, args.seed)
    answered: dict[str, Any] = {"model": args.model, "text": args.text, **found.to_json()}
    lines = [table_text(_table(found)), _counted(found), *_transitions(found)]
    if alphas:
        with attenuate(model, alphas, args.placement), waiting("measuring with attenuation"):
            weaker = curves(model, rows, args.skip, args.seed)
            losses = losses_of(model, data, args.batch)
        effect = _effect(losses_of(model, data, args.batch), losses, args.seed)
        answered["attenuation"] = {"alphas": {str(b): a for b, a in alphas.items()}, "placement": args.placement,
                                   "loss": effect, "transitions": weaker.to_json()["transitions"]}  # fmt: skip
        words = ", ".join(f"block {b}: {a:g}" for b, a in alphas.items())
        cells = [("the model itself", f"{effect['base']:.4f}", None, None),
                 (f"attenuated ({words})", f"{effect['attenuated']:.4f}", f"{effect['difference']:+.4f}",
                  f"{effect['low']:+.4f} to {effect['high']:+.4f}")]  # fmt: skip
        lines += ["", table_text(Table("", ("", "loss, nats a token", "difference", "95 % interval"), cells)),
                  *(f"attenuated: {line}" for line in _transitions(weaker))]  # fmt: skip
    if args.csv:
        write_text(args.csv, found.to_csv())
        lines.append(f"curves: {args.csv}")
    if args.trace:
        _trace(args, model, tokenizer, data, alphas)
        lines.append(f"trace: {args.trace}")
    return answer(args, answered, lines)


def _checked(args: argparse.Namespace) -> dict[int, float]:
    """Return alpha by block, or refuse everything that is wrong before the model is read."""
    from thrifty.llm.changes import parse_attenuation

    refusals = Refusals()
    check_model(refusals, args.model)
    check_reading(refusals, args)
    refusals.check(lambda: _texts(args.text))
    alphas = refusals.check(lambda: parse_attenuation(args.attenuate))
    refusals.unless(args.limit >= 1, f"--limit is {args.limit}; it must be at least 1")
    refusals.unless(args.skip >= 0, f"--skip is {args.skip}; it must be at least 0")
    refusals.unless(args.prompt is None or args.trace is not None, "--prompt is the text of --trace FILE.html")
    check_file(refusals, args.trace, "--trace", ".html")
    check_file(refusals, args.csv, "--csv", ".csv")
    check_file(refusals, args.json, "--json")
    refusals.raise_all()
    return alphas or {}


def _texts(path: str) -> Any:
    """Return the text of a plain file, or the examples of a JSONL file."""
    from thrifty.llm.loading import read_jsonl

    if path.endswith((".jsonl", ".json")):
        return read_jsonl(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"--text {path} does not exist; give a text file or a JSONL file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"--text {path} cannot be read as UTF-8 text: {err}") from err
    if not text.strip():
        raise DataError(f"--text {path} is empty")
    return text


def _sequences(args: argparse.Namespace, tokenizer: Any) -> list[Encoded]:
    """Return at most --limit sequences; plain text is cut every --max-tokens tokens."""
    from thrifty.llm.loading import Encoded, encode

    found = _texts(args.text)
    if not isinstance(found, str):
        return encode(found[: args.limit], tokenizer, args.max_tokens, end=False, chat=args.chat)
    ids = list(tokenizer(found[: 16 * args.max_tokens * args.limit])["input_ids"])
    cut = [tuple(ids[i : i + args.max_tokens]) for i in range(0, len(ids), args.max_tokens)][: args.limit]
    return [Encoded(part) for part in cut if len(part) > args.skip + 1] or [Encoded(cut[0])]


def _table(found: Curves) -> Any:
    from thrifty.report import Table

    means = {name: found.mean(name) for name in COLUMNS}
    rows = [[depth, *(_digits(means[name][depth]) for name in COLUMNS)] for depth in range(found.depths)]
    return Table("", ("depth", *COLUMNS.values()), rows)


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _counted(found: Curves) -> str:
    left = ", ".join(f"{why}: {n}" for why, n in found.excluded.items() if n)
    tied = "" if found.tied else "; untied: 'token' by the input matrix, 'next' by the output matrix"
    return (
        f"{int(found.counts.sum())} positions of {len(found.counts)} sequences (left out: {left}); always the most "
        f"frequent token: {found.unigram:.3f}{tied}"
    )


def _transitions(found: Curves) -> list[str]:
    return [f"turn by {words}: {_turn(found.transition(kind), found.depths - 1)}" for kind, words in KINDS.items()]


def _turn(at: Transition, blocks: int) -> str:
    if at.depth is None or at.crossing is None:
        return "none: the next token never stays ahead"
    some = f" (95 % interval {at.low:.1f} to {at.high:.1f})" if at.low is not None and at.high is not None else ""
    never = f"; {100 * at.never:.0f} % of resamples have none" if at.never > 0 else ""
    return f"depth {at.crossing:.1f} of {blocks}{some}{never}"


def _effect(base: Any, changed: Any, seed: int) -> dict[str, float]:
    from thrifty.llm.inner_loop import bootstrap

    low, high = bootstrap(changed - base, seed)
    return {"base": float(base.mean()), "attenuated": float(changed.mean()),
            "difference": float((changed - base).mean()), "low": low, "high": high}  # fmt: skip


def _trace(
    args: argparse.Namespace, model: Any, tokenizer: Any, data: Sequence[Encoded], alphas: dict[int, float]
) -> None:
    from contextlib import nullcontext

    import torch

    from thrifty.llm.causal_shift import attenuate, trace
    from thrifty.report import write_text

    if args.prompt is not None:
        ids = read_prompt(tokenizer, args.prompt, args.chat)[0]
    else:
        ids = torch.tensor(data[0].ids[:TRACED])
    weaker: Any = attenuate(model, alphas, args.placement) if alphas else nullcontext()
    with weaker:
        page = trace(model, ids.to(model.device), tokenizer).to_html(f"Decoding trajectory, {Path(args.model).name}")
    write_text(args.trace, page)
