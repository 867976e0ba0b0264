"""Targets: the cores and boards of targets.toml."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from thrifty.errors import NoMatch, close_to


@dataclass(frozen=True)
class Target:
    """A core, or a board with its memory; one table of targets.toml."""

    name: str
    core: str  # the table that says how to compile and emulate: "cortex-m4", ..., "host"
    title: str
    isa: str  # "dsp" or "portable"
    gcc_flags: tuple[str, ...] = ()
    zig_flags: tuple[str, ...] = ()
    unicorn: str | None = None  # name of the core in unicorn.arm_const
    qemu: str | None = None  # QEMU machine
    flash_bytes: int | None = None  # None: no limit known
    ram_bytes: int | None = None


@functools.cache
def targets() -> dict[str, Target]:
    """Return every target by name, cores first.

    >>> sorted(name for name, t in targets().items() if t.core == "cortex-m4")
    ['cortex-m4', 'nrf52840', 'nucleo-f446re', 'nucleo-l452re', 'nucleo-l4r5zi']
    """
    tables = tomllib.loads(resources.files("thrifty").joinpath("targets.toml").read_text(encoding="utf-8"))
    return {name: _from_table(name, tables) for name in tables}


def target(name: str | Target) -> Target:
    """Return the target called `name`. Raises NoMatch with the near matches.

    >>> target("nucleo-l452re").ram_bytes
    163840
    """
    if isinstance(name, Target):
        return name
    if name not in targets():
        raise NoMatch(f"there is no target '{name}'; {close_to(name, targets())}")
    return targets()[name]


def _from_table(name: str, tables: dict[str, dict[str, Any]]) -> Target:
    core = tables[name].get("core", name)
    merged = {**tables[core], **tables[name], "core": core}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in merged.items()}
    return Target(name=name, **values)
