"""What is looped and how: the plan of an inner loop, checked against a model, as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from thrifty.errors import DataError, KnobError, close_to

MODES = ("uniform", "naive", "reference", "alignment", "damped", "noise")
GRANULARITIES = ("block", "boundary")
KV_MODES = ("own", "first_pass")
SCOPES = ("position", "last")


@dataclass(frozen=True)
class Plan:
    """Blocks start..end-1 run `passes` times in all; passes = 1 is the model itself.

    Source: Inner Loop Inference (2026): a block range of a frozen transformer is applied again, and each output is
    mixed with those of the passes before it. Our reading of its released code is in docs/inner_loop.md.
    """

    start: int  # first block of the range, from 0
    end: int  # behind the last block of the range
    passes: int = 2  # how often the range runs in all
    mode: str = "uniform"  # how a pass is mixed with those before it: one of MODES
    granularity: str = "block"  # "block": every block's output is mixed; "boundary": that of the range only
    kv_mode: str = "own"  # "own": each pass has its own keys and values; "first_pass": all read those of the first
    coefficient: float = 0.5  # "reference": share of the newest state against the first
    temperature: float = 1.0  # "alignment": of the softmax over cosines
    scope: str = "position"  # "alignment": cosines at every position, or at the "last" one (scoring only)
    seed: int = 0  # "noise": of the directions

    def __post_init__(self) -> None:
        wrong = []
        for name in ("start", "end", "passes", "seed"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                wrong.append(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        whole = not wrong
        if whole and not 0 <= self.start < self.end:
            wrong.append(f"{self.start}..{self.end} is no range: start counts from 0, end lies behind the last block")
        if whole and self.passes < 1:
            wrong.append(f"passes is {self.passes}; it counts all passes and must be at least 1")
        choices = {"mode": MODES, "granularity": GRANULARITIES, "kv_mode": KV_MODES, "scope": SCOPES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                wrong.append(f"{name} is {getattr(self, name)!r}; {close_to(str(getattr(self, name)), known)}")
        if not (_real(self.coefficient) and 0 <= self.coefficient <= 1):
            wrong.append(f"coefficient is {self.coefficient!r}; it must be in [0, 1]")
        if not (_real(self.temperature) and self.temperature > 0):
            wrong.append(f"temperature is {self.temperature!r}; it must be positive")
        if wrong:
            raise KnobError("; ".join(wrong))

    def order(self, blocks: int) -> list[int]:
        """Return the blocks of a model with so many, in the order in which they run.

        >>> Plan(1, 3, passes=2).order(4)
        [0, 1, 2, 1, 2, 3]
        """
        return [*range(self.start), *(list(range(self.start, self.end)) * self.passes), *range(self.end, blocks)]

    def refuse_beyond(self, blocks: int) -> None:
        """Raise KnobError when a model with so many blocks does not have the range."""
        if self.end > blocks:
            raise KnobError(f"the plan loops blocks {self.start}..{self.end - 1}; the model has blocks 0..{blocks - 1}")

    def extra_share(self, blocks: int) -> float:
        """Return the blocks that run in addition, as a share of all.

        >>> Plan(1, 3, passes=3).extra_share(8)
        0.5
        """
        return (self.passes - 1) * (self.end - self.start) / blocks

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps({"schema": 1, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan of a JSON text; raise DataError for another one."""
        try:
            values: dict[str, Any] = json.loads(text)
            schema = values.pop("schema")
            if schema != 1:
                raise DataError(f"the plan has schema {schema}; this thrifty reads 1")
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise DataError(f"this is no plan of an inner loop: {err!r}") from err


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
