"""`thrifty llm decode`: texts of a masked diffusion model that are good and differ (D5P4)."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from thrifty.cli.llm.shared import Refusals, add_answer, answer, check_file, quiet, waiting
from thrifty.errors import KnobError

if TYPE_CHECKING:
    from thrifty.llm.d5p4 import Samples

MODEL = "a folder of a Hugging Face masked language model (AutoModelForMaskedLM)"
METHODS = ("greedy_map", "map_set", "greedy_beam", "diverse_beam", "independent", "k_dpp", "exhaustive", "best_of")
FORMS = ("additive", "multiplicative")
QUALITIES = ("entropy", "masked_entropy", "self_certainty")  # thrifty.llm.d5p4.QUALITIES
STYLES = ("subs", "bidirectional")
QUALITY = 32  # samples of the bound that says how likely a text is


def add(methods: Any) -> None:
    """Add the method and its flags."""
    from thrifty.cli.parser import _verb

    parser = _verb(
        methods, "decode", "decode a masked diffusion model into K texts that are good and differ (D5P4)",
        "Each step costs K x W forward passes, in whatever way the survivors are chosen.",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="FOLDER", help=MODEL)
    parser.add_argument("--device", default="cpu", help="where it runs, such as cuda (%(default)s)")
    parser.add_argument("--style", choices=STYLES, default="subs", help="MDLM's or LLaDA's (%(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="what comes before the masks; it may hold mask tokens itself")
    parser.add_argument("--masks", type=int, metavar="N", help="tokens to decode (32, or those in the prompt)")
    parser.add_argument("--keep", type=int, default=4, metavar="K", help="texts that are wanted (%(default)s)")
    parser.add_argument("--children", type=int, default=4, metavar="W", help="candidates a text and step (%(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="of decoding (as many as masks)")
    parser.add_argument("--method", choices=METHODS, default="greedy_map", help="how K survive (%(default)s)")
    parser.add_argument("--form", choices=FORMS, default="additive", help="of the kernel: D5P4+ or D5P4x (%(default)s)")
    parser.add_argument("--beta", type=float, default=1.0,
                        help="additive: more diversity; multiplicative: more quality (%(default)s)")  # fmt: skip
    parser.add_argument("--alpha", type=float, default=1.0, help="diversity of diverse_beam (%(default)s)")
    parser.add_argument(
        "--quality", choices=QUALITIES, default="entropy",
        help="entropy also favours what has decided more; masked_entropy does not (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, help="of the tokens (%(default)s)")
    parser.add_argument("--block", type=int, default=0, metavar="N", help="tokens of a block, as in LLaDA; 0: none")
    parser.add_argument("--guidance", type=float, metavar="S", help="above 1 follows the prompt more; 0 ignores it")
    parser.add_argument("--baseline", action="store_true", help="independent samples of the same cost as well")
    parser.add_argument("--batch", type=int, default=16, help="sequences at a time (%(default)s)")
    add_answer(parser)


def run(args: argparse.Namespace) -> int:
    """Decode, measure, print; exit code 0."""
    from thrifty.cli.show import progress_bar, table_text
    from thrifty.llm import d5p4
    from thrifty.report import Table

    selector = _checked(args)
    quiet()
    with waiting(f"reading {args.model}"):
        denoiser, tokenizer = d5p4.load_masked_lm(args.model, args.style, args.guidance, args.batch, args.device)
    start = _start(args, denoiser, tokenizer)
    runs = {"D5P4" if args.method in ("greedy_map", "map_set") else args.method: selector}
    if args.baseline:
        runs["independent samples"] = None
    answered: dict[str, Any] = {"model": args.model, "prompt": args.prompt, "k": args.keep, "w": args.children,
                                "selector": asdict(selector), "seed": args.seed, "runs": []}  # fmt: skip
    lines, rows = [], []
    for name, of in runs.items():
        begun = time.perf_counter()
        with progress_bar(name) as bar:
            move = None if bar is None else (lambda done, total, bar=bar: bar(done, total, "steps"))
            made = _sample(args, denoiser, start, of, move)
        seconds = time.perf_counter() - begun
        result = _measured(args, denoiser, tokenizer, start, made)
        answered["runs"].append({"name": name, "seconds": seconds, **result})
        lines += [f"{name}:", *(f"  {text!r}" for text in result["texts"])]
        rows.append((name, _number(result["bound"]), _number(result["distinct_2"]), _number(result["self_bleu"], 1),
                     _number(result["mean_cosine"]), _number(result["vendi"], 2), made.passes))  # fmt: skip
    columns = ("", "log-likelihood a token", "distinct-2", "self-BLEU", "cosine", "Vendi", "forward passes")
    lines += ["", table_text(Table("", columns, rows)),
              f"log-likelihood: a bound from {QUALITY} random masks, with further passes; the rest is diversity:",
              "distinct-2 and Vendi (1 to K) are high, self-BLEU and cosine low where texts differ"]  # fmt: skip
    return answer(args, answered, lines)


def _checked(args: argparse.Namespace) -> Any:
    """Return the selector, or refuse everything that is wrong before the model is read."""
    from thrifty.llm.d5p4 import Select

    refusals = Refusals()
    _check_folder(refusals, args.model)
    selector = refusals.check(
        lambda: Select(
            args.method, form=args.form, beta=args.beta, alpha=args.alpha, quality=args.quality, seed=args.seed
        )
    )
    for flag in ("keep", "children", "batch", "masks", "steps"):
        value = getattr(args, flag)
        refusals.unless(value is None or value >= 1, f"--{flag} is {value}; it must be at least 1")
    refusals.unless(args.block >= 0, f"--block is {args.block}; it must be 0 or more")
    refusals.unless(args.temperature >= 0, f"--temperature is {args.temperature}; it must be at least 0")
    refusals.unless(args.guidance is None or args.guidance >= 0, f"--guidance is {args.guidance}; at least 0")
    refusals.unless(args.guidance is None or bool(args.prompt), "--guidance needs a --prompt to follow")
    check_file(refusals, args.json, "--json")
    refusals.raise_all()
    return selector


def _check_folder(refusals: Refusals, path: str) -> None:
    from pathlib import Path

    fine = (Path(path) / "config.json").is_file()
    refusals.unless(fine, f"--model {path} holds no config.json; give the folder of a masked language model")


def _start(args: argparse.Namespace, denoiser: Any, tokenizer: Any) -> Any:
    """Return the token ids (t,) to begin with: the prompt, and masks."""
    import torch

    ids = list(tokenizer(args.prompt, add_special_tokens=False)["input_ids"]) if args.prompt else []
    inside = ids.count(denoiser.mask_id)
    more = args.masks if args.masks is not None else (0 if inside else 32)
    state = torch.tensor([*ids, *[denoiser.mask_id] * more])
    if denoiser.longest is not None and len(state) > denoiser.longest:
        raise KnobError(
            f"{len(ids)} tokens of the prompt and {more} masks are {len(state)}; the model takes {denoiser.longest}. "
            "Shorten the prompt, or lower --masks"
        )
    if args.guidance is not None and len(ids) == inside:
        raise KnobError("--guidance needs a prompt with more than masks in it")
    return state


def _sample(args: argparse.Namespace, denoiser: Any, start: Any, selector: Any, progress: Any) -> Samples:
    import torch

    from thrifty.llm import d5p4

    masks = int((start == denoiser.mask_id).sum())
    process: Any = d5p4.Blocks(args.block, temperature=args.temperature) if args.block else d5p4.Mdlm(args.temperature)
    return d5p4.sample(
        denoiser, args.keep, args.children, args.steps or masks, selector, start=start, process=process,
        generator=torch.Generator().manual_seed(args.seed), progress=progress, device=args.device,
    )  # fmt: skip


def _measured(args: argparse.Namespace, denoiser: Any, tokenizer: Any, start: Any, made: Samples) -> dict[str, Any]:
    """Return the K texts, how likely they are and how much they differ."""
    import torch

    from thrifty.llm import d5p4
    from thrifty.llm.d5p4 import metrics

    rows, asked = made.representatives.cpu(), start == denoiser.mask_id
    generator = torch.Generator().manual_seed(args.seed)
    how = (generator, QUALITY, args.batch, args.device)
    bounds = [d5p4.log_likelihood_bound(denoiser, row, asked, *how) for row in rows]
    written = [row[asked].tolist() for row in rows]
    _, hidden = denoiser(rows.to(args.device), ~asked.to(args.device), args.guidance is not None)
    hidden = hidden.cpu()
    cosines = d5p4.gram(hidden[:, asked])
    several = len(rows) > 1
    return {
        "texts": [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows],
        "bound": sum(b.value / b.tokens for b in bounds) / len(bounds),
        "distinct_2": metrics.distinct(written, 2),
        "self_bleu": metrics.self_bleu(written) if several else None,
        "mean_cosine": metrics.mean_cosine(hidden[:, asked].flatten(1)) if several else None,
        "vendi": metrics.vendi(cosines),
        "forward_passes": made.passes,
        "quality_passes": sum(b.passes for b in bounds) + len(rows) * denoiser.passes(),
        "lineages": list(made.lineages),
    }


def _number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
