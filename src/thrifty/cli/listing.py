"""What `thrifty list` shows."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from thrifty.budget import format_bytes
from thrifty.cli.parser import comments
from thrifty.compress import TECHNIQUES
from thrifty.data import SOURCES
from thrifty.deploy.targets import targets
from thrifty.report import Table
from thrifty.zoo import ZOO


def _techniques() -> Table:
    rows = []
    for name, kind in TECHNIQUES.items():
        rows.append([name, "", "", (kind.__doc__ or "").splitlines()[0]])
        words = comments(kind)
        for field in fields(kind):
            default = "needed" if field.default is MISSING and field.default_factory is MISSING else _default(field)
            rows.append(["", field.name, default, words.get(field.name, "")])
    return Table("", ("technique", "knob", "default", "what it is"), rows)


def _default(field: Any) -> str:
    return str(field.default_factory() if field.default_factory is not MISSING else field.default)


def _targets() -> Table:
    rows = [
        [t.name, t.core, "–" if t.flash_bytes is None else format_bytes(t.flash_bytes),
         "–" if t.ram_bytes is None else format_bytes(t.ram_bytes), t.title]
        for t in targets().values()
    ]  # fmt: skip
    return Table("", ("target", "core", "flash", "RAM", "what it is"), rows)


def _data() -> Table:
    rows = [[name, SOURCES[name].licence, SOURCES[name].title] for name in SOURCES]
    return Table("", ("data set", "licence", "what it is"), rows)


def _zoo() -> Table:
    rows = [[f"zoo:{name}", (kind.__doc__ or "").splitlines()[0]] for name, kind in ZOO.items()]
    return Table("", ("architecture", "what it is"), rows)


LISTS = {"techniques": _techniques, "targets": _targets, "data": _data, "zoo": _zoo}
