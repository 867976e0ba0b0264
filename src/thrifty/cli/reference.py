"""The tables of docs/cli.md, made from the parser itself: `python -m thrifty.cli.reference docs/cli.md` renews them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from thrifty.cli.parser import make_parser

BEGIN, END = "<!-- flags of {}: begin, written by thrifty.cli.reference -->", "<!-- flags of {}: end -->"


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb, and of each method of a verb that has some."""
    return _below(make_parser())


def _below(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """Return what can be called, by name: "compress", and where a verb has methods "llm adapt"."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= _below(inner, f"{prefix}{name} ") or {f"{prefix}{name}": inner}
    return found


def flags_table(parser: argparse.ArgumentParser) -> str:
    """Return the arguments of one verb as a Markdown table, with the words of its --help."""
    rows = ["| argument | what it is |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = _value(action)
        name = " ".join([*action.option_strings, value]) if action.option_strings else value
        needed = "; needed" if action.required and action.option_strings else ""
        words = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append(f"| `{name.strip()}` | {_plain(words)}{needed} |")
    return "\n".join(rows)


def renewed(page: str) -> str:
    """Return the page with the table of each verb between its marks, which must be there."""
    for verb, parser in verbs().items():
        begin, end = BEGIN.format(verb), END.format(verb)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}\n{flags_table(parser)}\n{end}"
        page, found = pattern.subn(lambda _, text=text: text, page)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"the marks of {verb} are {found} times in the page, not once")
    return page


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    names = action.metavar or choices or action.dest.upper()
    words = [names] if isinstance(names, str) else list(names)
    if action.nargs == "?":
        return f"[{words[0]}]"
    return f"{' '.join(words)} ..." if action.nargs == "+" else words[0]


def _plain(words: str) -> str:
    return words.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(renewed(file.read_text(encoding="utf-8")), encoding="utf-8")
