"""`thrifty llm adapt | loop | shift | decode`: methods on language models that are on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from thrifty.cli.llm import adapt, decode, loop, shift

METHODS = {"adapt": adapt, "loop": loop, "shift": shift, "decode": decode}


def add(verbs: Any) -> None:
    """Add the verb, its methods and their flags."""
    from thrifty.cli.parser import _verb

    parser = _verb(
        verbs, "llm", "tune, loop, look into or decode a language model that is on this machine",
        "Nothing is downloaded. 'thrifty llm METHOD --help' lists the flags of a method.",
    )  # fmt: skip
    methods = parser.add_subparsers(dest="llm_method", metavar="METHOD", required=True)
    for module in METHODS.values():
        module.add(methods)


def run(args: argparse.Namespace) -> int:
    """Run the method; exit code 0."""
    code: int = METHODS[args.llm_method].run(args)
    return code
