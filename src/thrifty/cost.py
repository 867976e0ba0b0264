"""What a network takes. Every number says how it was obtained: counted, modelled or measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

HOW = ("counted", "modelled", "measured")


@dataclass(frozen=True)
class Cost:
    """What a network takes; None means not known. Addable: parts of a network sum to the whole.

    ram_bytes adds as a maximum, because parts do not run at the same time.
    """

    params: int | None = None  # counted: stored weights and biases
    weight_bytes: int | None = None  # counted: their bytes at their bit widths
    macs: int | None = None  # counted: multiply-accumulates of one inference
    activation_bytes: int | None = None  # counted: live-set lower bound of activation memory
    flash_bytes: int | None = None  # measured: code and constants of the linked image
    ram_bytes: int | None = None  # measured: arena, other data and stack high-water mark
    instructions: int | None = None  # measured: executed instructions of one inference
    cycles: int | None = None  # modelled from the instructions
    energy_uj: float | None = None  # modelled, microjoules of one inference

    def __add__(self, other: Cost) -> Cost:
        def both(name: str) -> Any:
            a, b = getattr(self, name), getattr(other, name)
            if a is None or b is None:
                return a if b is None else b
            return max(a, b) if name in ("ram_bytes", "activation_bytes") else a + b

        return Cost(**{f.name: both(f.name) for f in fields(Cost)})

    def to_dict(self) -> dict[str, Any]:
        """Return the known numbers."""
        return {k: v for k, v in asdict(self).items() if v is not None}


UNITS = {
    "params": "", "weight_bytes": "B", "macs": "", "activation_bytes": "B", "flash_bytes": "B", "ram_bytes": "B",
    "instructions": "", "cycles": "", "energy_uj": "uJ",
}  # fmt: skip
PROVENANCE = {
    "params": "counted", "weight_bytes": "counted", "macs": "counted", "activation_bytes": "counted",
    "flash_bytes": "measured", "ram_bytes": "measured", "instructions": "measured",
    "cycles": "modelled", "energy_uj": "modelled",
}  # fmt: skip
