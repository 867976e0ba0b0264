"""What thrifty says when it refuses: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ThriftyError(Exception):
    """Any refusal of thrifty; the command line turns it into one message and exit code 2."""


class KnobError(ThriftyError):
    """An option has a value outside its declared range."""


class DataError(ThriftyError):
    """Data, weights or a metric are not usable: empty, wrong shape, NaN."""


class NoMatch(ThriftyError):
    """A name that the user typed matches nothing."""


class Incompatible(ThriftyError):
    """Two techniques, or a technique and a model, do not go together."""


class NothingToDo(ThriftyError):
    """An edit would change nothing."""


class MissingExtra(ThriftyError):
    """An optional package or a system tool is not installed."""


class ToolError(ThriftyError):
    """A compiler, linker or emulator failed."""


class StoreError(ThriftyError):
    """A saved model cannot be written or read back."""


class CaptureError(ThriftyError):
    """torch.export cannot read the model."""


class UnsupportedModel(ThriftyError):
    """Operators that cannot be deployed, all of them at once.

    Attributes:
        refusals: one sentence per refused node, each with its module path and the nearest supported form.
    """

    def __init__(self, refusals: Iterable[str]) -> None:
        self.refusals = tuple(refusals)
        lines = "\n".join(f"  - {r}" for r in self.refusals)
        super().__init__(f"{len(self.refusals)} part(s) of the model cannot be used:\n{lines}")


def close_to(name: str, names: Iterable[str]) -> str:
    """Return the end of an error sentence: the near matches of `name`, or all the names.

    >>> close_to("cortex-m5", ["cortex-m4", "cortex-m7", "host"])
    'close: cortex-m7, cortex-m4'
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return "close: " + ", ".join(near) if near else "known: " + ", ".join(sorted(known))


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise MissingExtra with the exact command that installs it.

    >>> need("json", extra="deploy").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise MissingExtra(f"'{module}' is not installed; run: pip install 'thrifty[{extra}]'") from err
