"""A recipe: techniques in order, read from and written to TOML."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Protocol, Union, get_args, get_origin, get_type_hints

from thrifty.errors import KnobError, ThriftyError, close_to

if TYPE_CHECKING:
    from torch import nn

    from thrifty.task import Task

_NUMBERS: Mapping[type, type] = {int: Integral, float: Real}
_WORDS: Mapping[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Technique(Protocol):
    """A frozen dataclass of knobs with one verb."""

    def edit(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a changed copy of the model; the given one stays as it is."""


@dataclass(frozen=True)
class Recipe:
    """Techniques in the order in which they are applied.

    >>> len(Recipe())
    0
    """

    steps: tuple[Technique, ...] = ()

    def __post_init__(self) -> None:
        """Refuse steps that are no techniques."""
        object.__setattr__(self, "steps", tuple(self.steps))
        bad = [
            f"step {i} is {s!r}"
            for i, s in enumerate(self.steps, 1)
            if isinstance(s, type) or not is_dataclass(s) or not callable(getattr(s, "edit", None))
        ]
        if bad:
            raise KnobError(f"a recipe holds techniques (dataclasses with an edit), but {'; '.join(bad)}")

    def __iter__(self) -> Iterator[Technique]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def to_toml(self) -> str:
        """Return the recipe as TOML: one [[step]] table a technique, without knobs at their default."""
        return "\n".join(step_toml(step) for step in self.steps)

    @classmethod
    def from_toml(cls, text: str, table: Mapping[str, type]) -> Recipe:
        """Read a recipe; `table` names the techniques. Raises KnobError that lists everything wrong in it."""
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as err:
            raise KnobError(f"the recipe is not TOML: {err}") from err
        bad = [f"unknown table '{k}'; a recipe has [[step]] tables only" for k in content if k != "step"]
        tables = content.get("step", [])
        if not isinstance(tables, list):
            tables, bad = [], [*bad, "write [[step]] with two brackets"]
        steps = []
        for number, knobs in enumerate(tables, 1):
            try:
                steps.append(make_step(dict(knobs), table))
            except ThriftyError as err:
                bad.append(f"step {number}: {err}")
        if not tables and not bad:
            bad.append("it has no [[step]]")
        if bad:
            raise KnobError("the recipe cannot be used:\n" + "\n".join(f"  - {b}" for b in bad))
        return cls(tuple(steps))

    @classmethod
    def read(cls, path: str | Path, table: Mapping[str, type]) -> Recipe:
        """Read a recipe from a TOML file (see from_toml)."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as err:
            raise KnobError(f"there is no recipe {path}") from err
        except OSError as err:
            raise KnobError(f"the recipe {path} cannot be read: {err.strerror or err}") from err
        except UnicodeDecodeError as err:
            raise KnobError(f"the recipe {path} is not UTF-8 text") from err
        return cls.from_toml(text, table)


def technique_name(technique: Technique) -> str:
    """Return the name of a technique in recipes: its class name in small letters with underscores.

    >>> technique_name(Recipe())
    'recipe'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(technique).__name__).lower()


def knobs_of(technique: Technique) -> dict[str, Any]:
    """Return the knobs of a technique that are not at their default."""
    found = {}
    for f in fields(technique):  # type: ignore[arg-type]  # Recipe accepts dataclasses only
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(technique, f.name)
        if f.init and (default is MISSING or value != default):
            found[f.name] = value
    return found


def make_step(knobs: dict[str, Any], table: Mapping[str, type]) -> Technique:
    """Make one technique from the keys and values of its table."""
    name = knobs.pop("technique", None)
    if not isinstance(name, str):
        raise KnobError('it needs a line: technique = "NAME"; ' + close_to("", table))
    if name not in table:
        raise KnobError(f"no technique '{name}'; {close_to(name, table)}")
    kind = table[name]
    known = [f.name for f in fields(kind) if f.init]
    strange = [f"'{k}' ({close_to(k, known)})" for k in knobs if k not in known]
    if strange:
        raise KnobError(f"{name} has no knob {', '.join(strange)}")
    if wrong := mistyped(kind, knobs):
        raise KnobError(f"{name}: {'; '.join(wrong)}")
    try:
        step: Technique = kind(**{k: untangle(v) for k, v in knobs.items()})
    except (TypeError, ValueError) as err:
        raise KnobError(f"{name}: {err}") from err
    return step


def mistyped(kind: Callable[..., Any], knobs: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each knob whose value is not of the type that `kind`, a dataclass or a function, declares.

    Whole numbers are numbers as well; true and false are none. Types that TOML does not have are not examined.
    """
    try:
        hints = get_type_hints(kind)
    except NameError:  # declared with a name that only type checkers see
        return []
    return [
        f"{name} is {value!r}; it must be {_in_words(hints[name])}"
        for name, value in knobs.items()
        if name in hints and not _fits(value, hints[name])
    ]


def refuse_mistyped(step: Technique) -> None:
    """Raise KnobError when a knob of a technique is not of its declared type; for __post_init__."""
    values = {f.name: getattr(step, f.name) for f in fields(step)}  # type: ignore[arg-type]
    if wrong := mistyped(type(step), values):
        raise KnobError(f"{type(step).__name__}: {'; '.join(wrong)}")


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if kind is Any:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(v, inner[1]) for v in value.values() if inner)
    if kind in (tuple, list, Sequence):
        if isinstance(value, str) and inner[:1] == (str,):
            return True  # techniques take one text for a list of one
        return isinstance(value, (tuple, list)) and all(_fits(v, inner[0]) for v in value if inner)
    return not isinstance(kind, type) or isinstance(value, _NUMBERS.get(kind, kind))


def _in_words(hint: Any) -> str:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_in_words(part) for part in inner if part is not NoneType)
    if kind in (dict, Mapping):
        return "a table" + (f" whose values are {_in_words(inner[1])}" if inner else "")
    if kind in (tuple, list, Sequence):
        return "a list" + (f" whose elements are {_in_words(inner[0])}" if inner else "")
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def untangle(value: Any) -> Any:
    """Return lists as tuples, all the way down."""
    if isinstance(value, list):
        return tuple(untangle(v) for v in value)
    if isinstance(value, dict):
        return {k: untangle(v) for k, v in value.items()}
    return value


def step_toml(step: Technique) -> str:
    """Return one [[step]] table."""
    lines = ["[[step]]", f'technique = "{technique_name(step)}"']
    for name, value in knobs_of(step).items():
        if value is None:
            where = f"{technique_name(step)}.{name}"
            raise KnobError(f"{where} is None, which is not its default; TOML cannot say so")
        lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Return a value as TOML text that reads back equal.

    >>> toml_value((0.5, "a", True, {"conv 1": 4}))
    '[0.5, "a", true, {"conv 1" = 4}]'
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        text = repr(float(value))
        return text if "." in text or not math.isfinite(value) else text.replace("e", ".0e")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Path):
        return toml_value(str(value))
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_value(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
    raise KnobError(f"a recipe cannot hold {value!r} of type {type(value).__name__}")
