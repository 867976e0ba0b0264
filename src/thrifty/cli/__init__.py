"""The command line: `thrifty VERB ...`. Exit code 0 = within the budget, 1 = not, 2 = a bad request, 130 = interrupted.

This package is the only part of thrifty that prints.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from thrifty.cli.parser import make_parser
from thrifty.errors import ThriftyError

YES, NO, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argv: without the program's name, sys.argv when None."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help, or what is wrong
        return int(stop.code or 0)
    try:
        verbs = importlib.import_module("thrifty.cli.verbs")
        code: int = verbs.VERBS[args.verb](args)
        sys.stdout.flush()
        return code
    except ThriftyError as err:
        return _say(str(err))
    except KeyboardInterrupt:
        hints = {
            "optimize": "; what was finished is kept: run the same command with --resume",
            **dict.fromkeys(("classify", "forecast"), "; features that were computed are kept: run the same command"),
        }
        _say(f"interrupted{hints.get(args.verb, '')}")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_REQUEST
    except OSError as err:
        where = f" {err.filename}" if err.filename else ""
        return _say(f"the system refused{where}: {err.strerror or err}")


def _say(words: str) -> int:
    sys.stderr.write(f"thrifty: {words}\n")
    return BAD_REQUEST
