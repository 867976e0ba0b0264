"""What is done to a loaded model before it is used: sparse adapters, attenuation, an inner loop, in this order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from thrifty.errors import DataError, KnobError, ThriftyError
from thrifty.llm.causal_shift import Attenuated, attenuate
from thrifty.llm.gallop import Adapter, combine
from thrifty.llm.inner_loop import Looped, Plan, loop

__all__ = ["Changed", "Changes", "change", "parse_attenuation", "parse_plan"]


@dataclass(frozen=True)
class Changes:
    """Adapters are summed and written into the weights; blocks are attenuated; a block range runs again."""

    adapters: tuple[str | Path, ...] = ()  # files of sparse adapters
    attenuation: Mapping[int, float] = field(default_factory=dict)  # block -> alpha
    placement: str = "attn"  # of the attenuation
    plan: Plan | None = None  # of the inner loop

    def to_json(self) -> dict[str, Any]:
        """Return plain data for reports."""
        return {
            "adapters": [str(path) for path in self.adapters],
            "attenuation": {str(block): alpha for block, alpha in self.attenuation.items()},
            "placement": self.placement,
            "plan": None if self.plan is None else asdict(self.plan),
        }


class Changed:
    """A changed model; `undo()` restores it, bit for bit. A context manager. Made by `change`."""

    def __init__(self, model: Any, changes: Changes) -> None:
        self.model, self.changes = model, changes
        self._adapter: Adapter | None = None
        self._attenuated: Attenuated | None = None
        self._looped: Looped | None = None

    def undo(self) -> Any:
        """Take everything out again and return the model; once is enough."""
        if self._looped is not None:
            self._looped.unloop()
        if self._attenuated is not None:
            self._attenuated.restore()
        if self._adapter is not None:
            self._adapter.unmerge(self.model)
        self._adapter = self._attenuated = self._looped = None
        return self.model

    def __enter__(self) -> Changed:
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo()

    def apply(self) -> None:
        """Apply the changes; on a refusal the model is as before."""
        of = self.changes
        try:
            if of.adapters:
                made = combine([Adapter.load(path) for path in of.adapters])
                made.merge(self.model)
                self._adapter = made
            if of.attenuation:  # inside the blocks, so that a loop takes it along
                self._attenuated = attenuate(self.model, of.attenuation, of.placement, form="module")
            if of.plan is not None:
                self._looped = loop(self.model, of.plan)
        except ThriftyError:
            self.undo()
            raise


def change(model: nn.Module, changes: Changes) -> Changed:
    """Apply changes to a Hugging Face causal language model in place.

    Blocks of the attenuation and of the plan are counted in the model as it is. Raises StoreError, Incompatible (an
    adapter of another base), KnobError, UnsupportedModel; the model is then as before.
    """
    changed = Changed(model, changes)
    changed.apply()
    return changed


def parse_plan(text: str, **knobs: Any) -> Plan:
    """Return the plan of "START:END:PASSES" (END behind the last block), of a JSON file or of the folder it lies in.

    knobs: further fields of `Plan`, which win over those of a file. Raises KnobError, DataError.

    >>> parse_plan("10:15:3").order(16)[8:16]
    [8, 9, 10, 11, 12, 13, 14, 10]
    """
    path = Path(text)
    path = path / "inner_loop.json" if path.is_dir() else path
    if path.suffix == ".json":
        if not path.is_file():
            raise DataError(f"the plan {path} does not exist; give START:END:PASSES, such as 10:15:3, or a JSON file")
        found = Plan.from_json(path.read_text(encoding="utf-8"))
        return Plan(**{**asdict(found), **knobs})
    parts = text.split(":")
    if len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
        raise KnobError(f"the plan is '{text}'; give START:END:PASSES, such as 10:15:3 (blocks 10 to 14, three passes)")
    start, end, passes = map(int, parts)
    return Plan(start, end, passes, **knobs)


def parse_attenuation(texts: Sequence[str]) -> dict[int, float]:
    """Return alpha by block of texts such as "17:0.5"; raise KnobError with all that are none.

    >>> parse_attenuation(["17:0.5", "20:0"])
    {17: 0.5, 20: 0.0}
    """
    found: dict[int, float] = {}
    bad = []
    for text in texts:
        block, colon, alpha = text.partition(":")
        block_of, alpha_of = _number(block, int), _number(alpha, float)
        if not colon or block_of is None or alpha_of is None:
            bad.append(f"'{text}'")
        elif block_of in found:
            bad.append(f"'{text}' (block {block_of} twice)")
        else:
            found[int(block_of)] = float(alpha_of)
    if bad:
        raise KnobError(f"{', '.join(bad)}: attenuation is BLOCK:ALPHA, such as 17:0.5, each block once")
    return found


def _number(text: str, kind: Callable[[str], int | float]) -> int | float | None:
    try:
        return kind(text)
    except ValueError:
        return None
