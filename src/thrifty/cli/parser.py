"""The flags of every verb. Nothing here may import torch: `thrifty --help` answers at once."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from thrifty import __version__
from thrifty.budget import Budget, parse_bytes, parse_count, parse_drop
from thrifty.cli import classify, forecast, groups, llm
from thrifty.errors import ThriftyError, close_to

MODEL = "file.py:Name, package.module:Name (a class or a function), zoo:NAME, or a folder saved by thrifty"
TARGET = "a core or a board of 'thrifty list targets'"
DATA = "an .npz file, a folder of images (CLASS/*.png), or a data set of 'thrifty list data'"
KINDS = ("techniques", "targets", "data", "zoo")
TAUGHT = ("distillation", "graph_distillation", "relational_distillation")  # keys of thrifty.objectives.TAUGHT


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage, and what is near."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d.*")  # so that "-1%" is a bad value, not a flag

    def error(self, message: str) -> NoReturn:
        if (choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is not None:
            near = close_to(choice[1], re.findall(r"[\w-]+", choice[2]))
            message = f"{message[: choice.start()]}'{choice[1]}' is not known; {near}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over here, where the flags are known."""
        found, rest = super().parse_known_args(args, namespace)
        if rest and getattr(found, "target", "") is None and self.prog.endswith(" check") and rest[0][:1] != "-":
            found.target = rest.pop(0)  # TARGET behind the flags: until Python 3.12 it is left over
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = [close_to(word, flags) for word in rest[:1] if word.startswith("--")]
            self.error("; ".join([f"unrecognized arguments: {' '.join(rest)}", *(n for n in near if "close" in n)]))
        return found, rest


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the name of the verb is in `args.verb`."""
    parser = _Parser(
        prog="thrifty",
        description="Neural networks that cost less: state a budget, get proven C for a microcontroller.",
        epilog="Exit code: 0 = within the budget, 1 = not, 2 = a bad request, 130 = interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"thrifty {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    own = (groups.add, classify.add, forecast.add, llm.add)
    for add in (_optimize, _compress, _deploy, _check, _profile, _train, *own, _report, _list):
        add(verbs)
    return parser


def comments(kind: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass: the one place where an option is explained.

    >>> comments(Budget)["ram_bytes"]
    'arena, other data and stack'
    """
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}
    found = re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", source, re.MULTILINE)
    return dict(found)


def pair(text: str) -> tuple[str, Any]:
    """Return (key, value) of "key=value"; the value is a Python literal where it reads as one, else text.

    >>> pair("ratio=0.5"), pair("schedule=cosine"), pair("input_shape=3,32,32")
    (('ratio', 0.5), ('schedule', 'cosine'), ('input_shape', (3, 32, 32)))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a shape such as 3,32,32 (without the batch axis)")
    return tuple(int(n) for n in text.split(","))


def _duration(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)\s*(s|min|m|h)?", text)
    try:
        return float(match[1]) * {"s": 1, "min": 60, "m": 60, "h": 3600}[match[2] or "s"] if match else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time such as 90, 90s, 10min or 2h") from None


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except ThriftyError as err:
            raise argparse.ArgumentTypeError(str(err)) from None

    return read


def _verb(verbs: Any, name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(), allow_abbrev=False
    )
    return parser


def _optimize(verbs: Any) -> None:
    parser = _verb(
        verbs, "optimize", "find the cheapest recipe that keeps the budget, and deploy it",
        "Writes OUT/c (the C project), OUT/model (to load again), OUT/recipe.toml, OUT/report.html, .md and .json.",
    )  # fmt: skip
    _inputs(parser, data_needed=True)
    _budget(parser)
    _target(parser)
    _out(parser, "build")
    parser.add_argument("--resume", action="store_true", help="go on with the search that is in OUT")
    parser.add_argument(
        "--trials", type=int, default=32, help="recipes that are built and measured at most (%(default)s)"
    )
    parser.add_argument(
        "--time-limit", type=_duration, metavar="TIME", help="start no trial after this time: 90s, 10min, 2h"
    )
    parser.add_argument(
        "--sampler", choices=("greedy", "optuna"), default="greedy", help="how recipes are chosen (%(default)s)"
    )
    parser.add_argument(
        "--level", type=int, choices=(1, 2), default=1, help="2 searches longer and finds smaller (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of each training in the search (%(default)s)")
    parser.add_argument("--no-train", dest="train", action="store_false", help="never train")
    parser.add_argument("--keep", nargs="+", default=(), metavar="PATTERN", help="modules that stay at full width")
    _teacher(parser, recovery=True)
    _common(parser)


def _compress(verbs: Any) -> None:
    parser = _verb(
        verbs, "compress", "apply a recipe: techniques in order",
        "Flash, RAM and instructions are measured at the end when they are limited, or with --target.",
    )  # fmt: skip
    _inputs(parser, data_needed=True)
    parser.add_argument("--recipe", metavar="FILE", help="a TOML file of [[step]] tables")
    parser.add_argument(
        "--step", nargs="+", action="append", default=[], metavar=("TECHNIQUE", "KNOB=VALUE"),
        help="a technique and its knobs, again for each step; see 'thrifty list techniques'",
    )  # fmt: skip
    _teacher(parser, recovery=True)
    _budget(parser)
    _target(parser, default=None)
    _out(parser, "build")
    _common(parser)


def _deploy(verbs: Any) -> None:
    parser = _verb(
        verbs, "deploy", "write the C project of a model and prove it, byte for byte, on the target",
        "torch, the NumPy program, C on this computer and C on the emulated target must give the same bytes.",
    )  # fmt: skip
    _inputs(parser, data_needed=True)
    _budget(parser)
    _target(parser)
    _out(parser, "build")
    parser.add_argument("--name", default="model", help="of the C functions and files (%(default)s)")
    parser.add_argument(
        "--samples", type=int, default=1000, help="real samples that every engine here runs (%(default)s)"
    )
    parser.add_argument(
        "--vectors", type=int, default=8, help="samples that the target runs and the self-test holds (%(default)s)"
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="what is scored (%(default)s)"
    )
    _common(parser)


def _check(verbs: Any) -> None:
    parser = _verb(
        verbs, "check", "say whether a model can be deployed on a target, and list all that cannot",
        "Exit code: 0 = it can, 1 = it cannot.",
    )  # fmt: skip
    _inputs(parser, data_needed=False)
    parser.add_argument("target", nargs="?", metavar="TARGET", help=f"{TARGET} (cortex-m4)")
    parser.add_argument("--target", dest="target_flag", metavar="TARGET", help="the same")
    _common(parser, "the answer")


def _profile(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "profile",
        "count what a model takes, layer by layer",
        "With --target also flash, RAM and instructions, measured.",
    )
    _inputs(parser, data_needed=False)
    _target(parser, default=None)
    _out(parser, None)
    _common(parser)


def _train(verbs: Any) -> None:
    parser = _verb(verbs, "train", "train a model and write its weights")
    _inputs(parser, data_needed=True)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training split (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05, help="largest step size (%(default)s)")
    parser.add_argument(
        "--knobs",
        nargs="+",
        type=pair,
        default=(),
        metavar="KNOB=VALUE",
        help="other fields of thrifty.training.Training",
    )
    parser.add_argument(
        "--out", default="weights.safetensors", metavar="FILE", help="where the weights go (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="keep a checkpoint beside OUT, and go on from it")
    _teacher(parser, recovery=False)
    _common(parser)


def _report(verbs: Any) -> None:
    parser = _verb(verbs, "report", "show a report again, or turn its JSON into HTML or Markdown")
    parser.add_argument("report", help="report.json, or the folder that holds it")
    parser.add_argument("--html", metavar="FILE", help="write it as one HTML file")
    parser.add_argument("--markdown", metavar="FILE", help="write it as Markdown")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")


def _list(verbs: Any) -> None:
    parser = _verb(verbs, "list", "list techniques with their knobs, targets, data sets, architectures")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one of them (all)")


def _inputs(parser: argparse.ArgumentParser, data_needed: bool) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("model", metavar="MODEL", help=MODEL)
    group.add_argument(
        "--model-args", nargs="+", type=pair, default=(), metavar="KEY=VALUE", help="arguments of the class"
    )
    group.add_argument(
        "--weights", metavar="FILE", help=".safetensors, .pt, or a folder saved by thrifty; read strictly"
    )
    group.add_argument("--factory", metavar="MODEL", help="the original class, when MODEL is a saved folder")
    group.add_argument("--data", required=data_needed, metavar="DATA", help=DATA)
    group.add_argument(
        "--data-args", nargs="+", type=pair, default=(), metavar="KEY=VALUE", help="options of the data set"
    )
    group.add_argument("--limit", type=int, metavar="ROWS", help="use only so many rows of each split, for quick tries")
    if not data_needed:
        group.add_argument(
            "--input-shape", type=_shape, metavar="C,H,W", help="instead of data: the shape of one input"
        )


def _teacher(parser: argparse.ArgumentParser, recovery: bool) -> None:
    """Add the flags of a teacher; recovery: the float model is one without any flag."""
    group = parser.add_argument_group("teacher")
    default = "; without it, the float model teaches the recovery of its compressed copy" if recovery else ""
    group.add_argument("--teacher", metavar="MODEL", help=f"whom the trained model learns from, as MODEL{default}")
    group.add_argument("--teacher-weights", metavar="FILE", help="as --weights, of the teacher")
    group.add_argument(
        "--teacher-args", nargs="+", type=pair, default=(), metavar="KEY=VALUE", help="arguments of the teacher's class"
    )
    group.add_argument(
        "--objective", choices=TAUGHT, metavar="NAME",
        help=f"what is learned from the teacher: {', '.join(TAUGHT)} ({TAUGHT[0]})",
    )  # fmt: skip
    group.add_argument(
        "--objective-knobs", nargs="+", type=pair, default=(), metavar="KNOB=VALUE",
        help="fields of that objective, see thrifty.objectives",
    )  # fmt: skip
    group.add_argument(
        "--objective-weight", type=float, metavar="WEIGHT", help="its weight beside the labels (1, 25 or 25)"
    )
    if recovery:
        group.add_argument("--no-teacher", action="store_true", help="labels alone")
        group.add_argument(
            "--no-teacher-check", action="store_true",
            help="do not train without the teacher as well, to say what it bought and keep the better",
        )  # fmt: skip


def _budget(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of Budget."""
    words = comments(Budget)
    group = parser.add_argument_group("budget")
    for field in fields(Budget):
        flag = "--" + field.name.removesuffix("_bytes").replace("_", "-")
        if field.name.endswith("_bytes"):
            parse, unit, example = parse_bytes, "SIZE", "64KiB"
        elif field.name == "max_drop":
            parse, unit, example = parse_drop, "DROP", "1%%"  # type: ignore[assignment]
        else:
            parse, unit, example = parse_count, "COUNT", "5M"
        text = f"{words.get(field.name, field.name)}; such as {example}"
        group.add_argument(flag, dest=field.name, type=_checked(parse), metavar=unit, help=text)


def _target(parser: argparse.ArgumentParser, default: str | None = "cortex-m4") -> None:
    text = TARGET + (f" ({default})" if default else "")
    parser.add_argument("--target", default=default, metavar="TARGET", help=text)


def _out(parser: argparse.ArgumentParser, default: str | None) -> None:
    text = "folder for everything that is written" + (f" ({default})" if default else "; nothing without it")
    parser.add_argument("--out", default=default, metavar="FOLDER", help=text)


def _common(parser: argparse.ArgumentParser, what: str = "the report") -> None:
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON and nothing else")


def known(values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return key=value pairs as a mapping; the last of equal keys counts."""
    return dict(values)
